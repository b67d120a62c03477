"""The copy of the paper's numbers is whole, and the checks find what its README says they find."""

import math
import re

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlm.errors import UserError
from qvlm.tables.published import (
    FOLDER,
    PUBLISHED_CLASSES,
    SUBJECTS,
    average_gaps,
    fractional_questions,
    label,
    published,
    table2_values,
)

GAPS = {
    ("llava_7b", "W6A6", "QLoRA"): -0.29,
    ("llava_13b", "W6A6", "AWQ"): -0.37,
    ("llava_13b", "W6A6", "Q-VLM"): +0.19,
    ("llava_13b", "W4A4", "AWQ"): -0.11,
    ("moe_llava", "W6A6", "Q-VLM"): -0.20,
    ("moe_llava", "W4A4", "QLoRA"): -0.51,
}


def rows_of(table: pd.DataFrame) -> set[tuple[str, str, str]]:
    return set(zip(table["model"], table["bits"], table["method"], strict=True))


def test_six_averages_do_not_follow_from_their_subjects() -> None:
    gaps = average_gaps(published("table2"))
    found = {(r["model"], r["bits"], r["method"]): r["gap"] for _, r in gaps.iterrows()}
    assert found.keys() == GAPS.keys()
    for row, gap in GAPS.items():
        assert found[row] == pytest.approx(gap, abs=0.005)
        assert f"{row[2]} ({gap:+.2f})" in re.sub(r"\s+", " ", readme())


def test_whole_numbers_of_questions() -> None:
    table = published("table2")
    fractional = rows_of(fractional_questions(table))
    whole = {row for row in rows_of(table) - fractional if row[0] != "llava_7b"}
    assert not any(model == "llava_7b" for model, *_ in fractional)
    assert whole == {("llava_13b", "FP", "FP"), ("llava_13b", "W4A4", "QLoRA")}


@settings(max_examples=30, deadline=None)
@given(st.fixed_dictionaries({name: st.integers(0, n) for name, n in PUBLISHED_CLASSES.items()}))
def test_what_is_counted_passes_both_checks(right: dict[str, int]) -> None:
    row = {name: round(100 * k / PUBLISHED_CLASSES[name], 2) for name, k in right.items()}
    questions = sum(PUBLISHED_CLASSES[name] for name in SUBJECTS)
    row["Avg"] = round(100 * sum(right[name] for name in SUBJECTS) / questions, 2)
    table = pd.DataFrame([{"model": "m", "bits": "FP", "method": "FP", **row}])
    assert fractional_questions(table).empty
    assert average_gaps(table).empty
    table["Avg"] += 0.2
    assert len(average_gaps(table)) == 1


@pytest.mark.parametrize(("accuracy", "whole"), [(50.0, True), (50.03, False), (0.04, True)])
def test_a_fraction_of_a_question_is_noticed(accuracy: float, whole: bool) -> None:
    """1 / 2,252 is 0.044 %; 50.03 % would be 1,126.7 questions."""
    values = dict.fromkeys(PUBLISHED_CLASSES, 0.0) | {"NAT": accuracy, "Avg": 0.0}
    table = pd.DataFrame([{"model": "m", "bits": "FP", "method": "FP", **values}])
    assert fractional_questions(table)["class"].tolist() == ([] if whole else ["NAT"])


def test_the_copy_is_whole() -> None:
    table = published("table2")
    assert len(table) == 21
    for model in ("llava_7b", "llava_13b", "moe_llava"):
        values = table2_values(model)
        assert len(values) == 7
        assert all(
            math.isfinite(v) and 0 < v < 100 for row in values.values() for v in row.values()
        )
    assert table2_values("llava_13b")["W4A4", "Q-VLM"]["Avg"] == 80.78
    assert table2_values("moe_llava")["FP", "FP"]["Avg"] == 62.68
    assert table2_values("llava_99b") == {}
    for number in (1, 3, 4, 5, 6):
        assert not published(f"table{number}").isna().to_numpy().any()
        assert set(published(f"table{number}")["model"]) <= set(published("models")["model"])


def test_tables_agree_with_each_other_where_they_print_the_same_number() -> None:
    """Table 2 against 1, 4 and 6."""
    for name in ("table1", "table4"):
        for _, row in published(name).iterrows():
            printed = table2_values(row["model"]).get((row["bits"], row["method"]))
            assert printed is None or printed["Avg"] == row["accuracy"]
    for _, row in published("table6").query("method == 'Q-VLM'").iterrows():
        assert table2_values(row["model"])["W4A4", "Q-VLM"]["Avg"] == row["W4A4_accuracy"]


def test_variants_name_cells_that_are_printed() -> None:
    for _, row in published("variants").iterrows():
        printed = table2_values(row["model"])[row["bits"], row["method"]][row["column"]]
        assert row["table"] == 2
        assert printed == row["printed"] != row["other_copy"]


def test_models_have_labels() -> None:
    assert (label("llava_13b"), label("moe_llava")) == ("LLaVA-13B", "MoE-LLaVA-1.6B")
    with pytest.raises(UserError, match="stands_for=x is not a model of the paper.*llava_13b"):
        label("x")


def readme() -> str:
    return (FOLDER / "README.md").read_text()


def test_the_readme_names_every_file() -> None:
    for file in FOLDER.glob("*.csv"):
        if file.stem in ("table1", "table6", "variants", "models"):
            assert f"`{file.name}`" in readme()

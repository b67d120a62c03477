"""Table 6: each method under each granularity, chosen apart, tested within a granularity."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from qvlm.records.record import Record, find_records
from qvlm.tables import table6, verify
from qvlm.tables.granularity import GRANULARITIES, activations
from qvlm.tables.table6 import TOKEN, cross, page, texts_of
from tests.helpers.pages import cells
from tests.helpers.records import make_layers, make_record

STATIC = ("per_channel", "per_channel_group", "per_tensor")


def quantizer(granularity: str) -> dict[str, Any]:
    return {"language": {"granularity": granularity}, "first_token": "quantized"}


def planted(runs: Path, method: str, granularity: str, accuracy: float, **more: Any) -> Record:
    return make_record(
        *(runs, method, more.pop("bits", "W4A4")),
        accuracy=accuracy,
        name=f"mini_llava-{method.lower().replace(' ', '').replace(',', '-')}-{granularity}",
        quantizer=quantizer(granularity),
        generated=True,
        **more,
    )


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """RTN and Q-VLM under three granularities, and scales per token."""
    folder = tmp_path / "runs"
    make_record(folder, bits="FP", accuracy=90, name="mini_llava-fp", generated=True)
    for index, granularity in enumerate(STATIC):
        planted(folder, "RTN", granularity, 80 - 20 * index)
        planted(folder, "Q-VLM", granularity, 85 - 20 * index)
    planted(folder, TOKEN, "per_channel", 88)
    return folder


def test_rows_of_other_questions_do_not_stand_beside(runs: Path) -> None:
    for record in find_records(runs):
        if "per_tensor" in record.name:
            shutil.rmtree(record.path)
    for method in ("RTN", "Q-VLM"):
        try_ = {"n": 40, "evaluation": {"limit": 40}, "finished": "2026-09-01"}
        planted(runs, method, "per_tensor", 70, **try_)
    text = page(cross(find_records(runs)), "make table6")
    assert "| static, per tensor" not in text
    aside = text.partition("## Records not shown")[2]
    assert aside.count("another setting: evaluation.limit is 40, not null") == 2
    assert "mini_llava-fp" not in aside
    assert "Questions: 300 of miniature, split test, seed 0." in text


def row_of(text: str, method: str, activations: str) -> list[str]:
    lines = [cells(line) for line in text.splitlines() if line.startswith("|")]
    return next(line for line in lines if line[:2] == [f"**{method}**", activations])


def test_every_granularity_of_a_method_has_a_row(runs: Path) -> None:
    text = page(cross(find_records(runs)), "make table6")
    for record in find_records(runs):
        if record.method != "FP":
            row = row_of(text, record.method, activations(record))
            assert row[2] == f"{record.metrics['classes']['Avg']['accuracy']:.2f}"
    static = [row_of(text, "RTN", GRANULARITIES[name])[2] for name in STATIC]
    assert len({*static}) == 3
    assert "## Records not shown" not in text  # a granularity is no other setting here
    assert "| *paper, LLaVA-13B, Q-VLM*" in text and "*80.78*" in text


def test_methods_are_tested_against_rounding_within_a_granularity(runs: Path) -> None:
    text = page(cross(find_records(runs)), "make table6")
    assert text.count("Paired tests, static") == 3
    assert "Paired tests, per token" not in text  # nothing there to test against


def test_a_row_that_is_not_proven_is_refused_and_named(runs: Path) -> None:
    planted(runs, "RoCo", "per_tensor", 89, layers=make_layers("W8A8"))
    text = page(cross(find_records(runs)), "make table6")
    assert "**RoCo**" not in text
    assert "`mini_llava-roco-per_tensor`" in text.partition("## Refused rows")[2]


def test_another_setting_is_set_aside_once(runs: Path) -> None:
    planted(runs, "AWQ", "per_tensor", 89, evaluation={"limit": 5})
    text = page(cross(find_records(runs)), "make table6")
    assert "**AWQ**" not in text
    assert text.partition("## Records not shown")[2].count("mini_llava-awq-per_tensor") == 1


def test_the_csv_has_what_the_page_has(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    assert table6.main(["--runs", str(runs), "--out", str(out)]) == 0
    frame = pd.read_csv(out / "table6.csv")
    assert len(frame) == 8 and list(frame.columns) == list(table6.COLUMNS)
    text = (out / "table6.md").read_text(encoding="utf-8")
    for row in frame[frame["method"] != "FP"].to_dict("records"):
        shown = row_of(text, row["method"], row["activations"])
        assert float(shown[2]) == pytest.approx(row["accuracy"], abs=0.005)
        assert float(shown[4]) == pytest.approx(row["against_fp"], abs=0.005)


def test_the_page_follows_from_its_answers(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    assert table6.main(["--runs", str(runs), "--out", str(out)]) == 0
    (checked,) = (entry for entry in verify.PAGES if entry.name == "table6")
    assert not verify.check(checked, out)
    path = out / "table6.md"
    path.write_text(path.read_text(encoding="utf-8").replace("make", "made", 0), encoding="utf-8")
    text = path.read_text(encoding="utf-8")
    value = row_of(text, "RTN", "static, per channel")[2]
    path.write_text(text.replace(f" {value} ", " 12.34 ", 1), encoding="utf-8")
    assert verify.check(checked, out)


def test_it_is_a_pure_function_of_the_records(runs: Path) -> None:
    records = find_records(runs)
    assert texts_of(records, "x") == texts_of(records[::-1], "x")

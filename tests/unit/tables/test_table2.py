"""Table 2 shows what the records say beside what the paper prints, and mixes neither."""

from pathlib import Path

import pandas as pd
import pytest

from qvlm.errors import UserError
from qvlm.records.record import Record, find_records, write_record
from qvlm.report.page import page as report_page
from qvlm.tables.table2 import COLUMNS, build, write
from tests.helpers.pages import cells, section, table2_page
from tests.helpers.records import STANDS_FOR, make_record


def test_the_long_form_is_the_records(runs: Path) -> None:
    records = [make_record(runs, bits="FP", accuracy=90), make_record(runs, n=200, accuracy=60)]
    make_record(runs, "AWQ", accuracy=65)
    records[1] = make_record(runs, accuracy=60)
    frame = build(find_records(runs))
    assert list(frame.columns) == list(COLUMNS)
    assert list(dict.fromkeys(zip(frame["bits"], frame["method"], strict=True))) == [
        ("FP", "FP"),
        ("W4A4", "RTN"),
        ("W4A4", "AWQ"),
    ]
    for record in records:
        own = frame[frame["run"] == record.name].set_index("class")
        assert list(own.index) == list(record.metrics["classes"])
        assert set(own["model"]) == {"mini_llava"}
        for name, row in record.metrics["classes"].items():
            assert own.loc[name, "n"] == row["n"]
            for key in ("accuracy", "ci_low", "ci_high", "unparsable"):
                assert own.loc[name, key] == round(row[key], 2)
        right = record.predictions["correct"]
        assert own.loc["Avg", "accuracy"] == round(100 * right.mean(), 2)


def test_the_paper_stands_beside_and_is_never_mixed_in(runs: Path) -> None:
    for model in STANDS_FOR:
        make_record(runs, bits="FP", model=model)
        for method in ("RTN", "AWQ"):
            make_record(runs, method, model=model, accuracy=61)
    make_record(runs, model="own_llava")
    frame = build(find_records(runs)).set_index(["model", "method", "class"])
    printed = frame["paper_accuracy"]
    assert printed["mini_llava", "AWQ", "Avg"] == 77.91
    assert printed["mini_moe_llava", "AWQ", "IMG"] == 47.81
    assert printed["mini_llava", "FP", "SOC"] == 93.14
    assert printed[:, "RTN", :].isna().all()
    assert printed[:, :, "G1-6"].isna().all()
    assert frame["paper_model"]["mini_llava"].unique().tolist() == ["LLaVA-13B"]
    assert frame["paper_model"]["mini_moe_llava"].unique().tolist() == ["MoE-LLaVA-1.6B"]
    assert frame["paper_model"]["own_llava"].isna().all()
    assert 77.91 not in frame["accuracy"].to_numpy()

    lines = section(table2_page(runs), "### mini_llava, W4A4").splitlines()
    (awq,) = (i for i, line in enumerate(lines) if line.startswith("| **AWQ**"))
    header = cells(lines[2])
    paper = dict(zip(header, cells(lines[awq + 2]), strict=True))
    assert cells(lines[awq + 2])[:2] == ["", "*paper, LLaVA-13B*"]
    assert (paper["TXT"], paper["G7-12"], paper["Avg"]) == ("*79.46*", "", "*77.91*")
    assert paper["Avg against FP"] == "*-12.09*"
    assert header[2:11] == ["NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg"]
    # Every printed number is in italics on a line that says whose it is.
    for line in table2_page(runs).splitlines():
        if line.startswith("|") and any(value in line for value in ("77.91", "47.81", "93.14")):
            assert cells(line)[1].startswith("*paper, ")
            assert all(c.startswith("*") and c.endswith("*") for c in cells(line)[1:] if c)


def test_the_page_shows_values_intervals_and_counts(runs: Path) -> None:
    record = make_record(runs, accuracy=60)
    reference = make_record(runs, bits="FP", accuracy=90)
    lines = section(table2_page(runs), "### mini_llava, W4A4").splitlines()
    rows = [cells(line) for line in lines if line.startswith("|")]
    classes = record.metrics["classes"]
    assert rows[2] == ["", "questions", *(str(row["n"]) for row in classes.values()), *[""] * 3]
    (at,) = (i for i, row in enumerate(rows) if row[0] == "**RTN**")
    assert rows[at][2:11] == [f"{row['accuracy']:.2f}" for row in classes.values()]
    assert rows[at + 1][2:11] == [
        f"{row['ci_low']:.1f}-{row['ci_high']:.1f}" for row in classes.values()
    ]
    full = reference.metrics["classes"]["Avg"]["accuracy"]
    assert float(rows[at][11]) == pytest.approx(classes["Avg"]["accuracy"] - full, abs=0.006)
    low, high = (float(bound) for bound in rows[at + 1][11].split(" to "))
    assert low < float(rows[at][11]) < high
    (cost,) = (row for row in rows if row[0] == "RTN")
    assert cost[1:] == [
        *(f"{classes['Avg']['unparsable']:.2f}", "not recorded", "2.0", "7", "1.5", "700", "5"),
        *("16 / 15", "0", "0"),
    ]


def with_kl(record: Record, mean: float, error: float | None) -> Record:
    metrics = {**record.metrics, "kl": {"mean": mean, "standard_error": error}}
    parts = record.config, record.run, metrics, record.predictions, record.layers
    return write_record(record.path, *parts)


def test_changed_answers_and_divergence_stand_beside_accuracy(runs: Path) -> None:
    reference = make_record(runs, bits="FP", accuracy=90)
    record = with_kl(make_record(runs, accuracy=60, seed=3), 0.0312345, 0.001)
    make_record(runs, "AWQ", accuracy=61)  # of older code, which did not measure it
    frame = build(find_records(runs)).set_index(["method", "class"])
    own, other = (r.predictions["prediction"].fillna(-1) for r in (record, reference))
    pictured = record.predictions["has_image"]
    assert frame["changed"]["RTN", "Avg"] == round(100 * (own != other).mean(), 2)
    assert frame["changed"]["RTN", "IMG"] == round(100 * (own != other)[pictured].mean(), 2)
    assert frame["changed"]["FP", "Avg"] == 0
    assert frame["kl"]["RTN", "Avg"] == 0.03123
    assert frame["kl"]["AWQ", :].isna().all()

    lines = section(table2_page(runs), "### mini_llava, W4A4").splitlines()
    rows = [cells(line) for line in lines if line.startswith("|")]
    at = {row[0]: index for index, row in enumerate(rows) if row[0].startswith("**")}
    assert rows[at["**RTN**"]][-2:] == [f"{100 * (own != other).mean():.2f}", "0.0312"]
    low, high = (float(bound) for bound in rows[at["**RTN**"] + 1][-2].split("-"))
    assert low < 100 * (own != other).mean() < high
    assert rows[at["**RTN**"] + 1][-1] == "0.0293-0.0332"
    assert rows[at["**AWQ**"]][-1] == "not measured"
    assert rows[at["**FP**"]][-2:] == ["", ""]


def test_changed_answers_are_not_known_without_full_precision(runs: Path) -> None:
    make_record(runs)
    assert build(find_records(runs))["changed"].isna().all()
    assert "not known" in section(table2_page(runs), "### mini_llava, W4A4")


def test_the_divergence_of_a_single_problem_has_no_interval(runs: Path) -> None:
    make_record(runs, bits="FP")
    with_kl(make_record(runs), 0.0312345, None)
    lines = section(table2_page(runs), "### mini_llava, W4A4").splitlines()
    ends = [cells(line)[-1] for line in lines if line.startswith("|")]
    assert ends[ends.index("0.0312") + 1] == "-"
    report = report_page(find_records(runs), "qvlm report")
    assert "0.03123 nats per answer token" in report


def test_the_csv_has_all_digits_of_the_divergence(runs: Path) -> None:
    make_record(runs, bits="FP")
    with_kl(make_record(runs), 0.00123456, 0.0001)
    csv, _ = write(find_records(runs), runs.parent / "out", "make table2")
    rows = pd.read_csv(csv).set_index(["method", "class"])
    assert rows.loc[("RTN", "Avg"), "kl"] == 0.00123
    assert rows.loc[("RTN", "Avg"), "kl_error"] == 0.0001
    assert ",0.00123,0.00010," in csv.read_text()


def test_the_share_of_cut_answers_is_shown(runs: Path) -> None:
    record = make_record(runs)
    metrics = {**record.metrics, "cut": 12.345}
    write_record(record.path, record.config, record.run, metrics, record.predictions, record.layers)
    lines = section(table2_page(runs), "### mini_llava, W4A4").splitlines()
    rows = [cells(line) for line in lines if line.startswith("|")]
    (header,) = (row for row in rows if "unparsable, %" in row)
    (cost,) = (row for row in rows if row[0] == "RTN")
    assert dict(zip(header, cost, strict=True))["cut, %"] == "12.35"


def test_a_class_without_questions_is_accepted(runs: Path) -> None:
    record = make_record(runs, n=3)
    empty = [name for name, row in record.metrics["classes"].items() if row["n"] == 0]
    assert empty
    frame = build([record]).set_index("class")
    assert frame.loc[empty, "accuracy"].isna().all()
    assert "| -" in table2_page(runs)


def test_a_missing_reference_is_said(runs: Path) -> None:
    make_record(runs)
    make_record(runs, model="mini_moe_llava")
    make_record(runs, bits="FP", model="mini_moe_llava")
    text = table2_page(runs)
    sentence = "has no full-precision record"
    assert f"mini_llava {sentence}" in section(text, "## mini_llava, which")
    assert sentence not in section(text, "## mini_moe_llava")


def test_the_printed_numbers_that_do_not_add_up_are_named(runs: Path) -> None:
    make_record(runs, "AWQ")
    assert "## The printed numbers" in table2_page(runs)
    assert "LLaVA-13B W4A4 AWQ: Avg is 77.91" in table2_page(runs)
    make_record(runs, "QLoRA")
    assert "TXT is 78.25 in one copy of the paper and 78.35 in another" in table2_page(runs)


def test_the_page_says_how_it_was_made_and_nothing_of_when(runs: Path) -> None:
    for bits in ("FP", "W4A4"):
        make_record(runs, bits=bits)
    text = table2_page(runs)
    made = section(text, "## How this was made")
    for words in (
        "`make table2`",
        "Some CPU, 2 cores, 16 GiB, 2 threads",
        "python 3.11.7, torch 2.13.0",
        "revision 0123456789ab",
        "Seed: 0",
        "300 of miniature, split test, seed 0",
        "3 problems of split train",
        "weight per_group 64, p 0.5",
    ):
        assert words in made
    assert "2026" not in text
    assert str(runs.parent) not in text
    assert table2_page(runs) == text


def test_an_unknown_model_of_the_paper_is_the_users_error(runs: Path) -> None:
    record = make_record(runs)
    record.config["model"]["stands_for"] = "llava_99b"
    with pytest.raises(UserError, match=r"llava_99b.*llava_13b"):
        build([record])

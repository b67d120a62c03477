"""Table 2 shows what the records prove, says what it leaves out, and invents nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from qvlm.errors import RunError, UserError
from qvlm.markdown import table
from qvlm.records.record import Record, find_records, write_record
from qvlm.tables import table2
from qvlm.tables.comparison import compare, paired
from qvlm.tables.selection import select
from qvlm.tables.table2 import COLUMNS, build, main, write
from tests.helpers.records import LAYERS, STANDS_FOR, cells, make_layers, make_record


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder for records."""
    return tmp_path / "runs"


def page(runs: Path) -> str:
    """The Markdown page of a folder."""
    _, markdown = write(find_records(runs), runs.parent / "out", "make table2")
    return markdown.read_text()


def section(text: str, title: str) -> str:
    """From one heading to the next of the same or a higher level."""
    assert title in text, title
    level = title.partition(" ")[0]
    body = text[text.index(title) + len(title) :].splitlines()
    ends = [i for i, line in enumerate(body) if line.startswith(("# ", "## ", f"{level} "))]
    return "\n".join(body[: ends[0]] if ends else body)


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

    lines = section(page(runs), "### mini_llava, W4A4").splitlines()
    (awq,) = (i for i, line in enumerate(lines) if line.startswith("| **AWQ**"))
    header = cells(lines[2])
    paper = dict(zip(header, cells(lines[awq + 2]), strict=True))
    assert cells(lines[awq + 2])[:2] == ["", "*paper, LLaVA-13B*"]
    assert (paper["TXT"], paper["G7-12"], paper["Avg"]) == ("*79.46*", "", "*77.91*")
    assert paper["Avg against FP"] == "*-12.09*"
    assert header[2:11] == ["NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg"]
    # Every printed number is in italics on a line that says whose it is.
    for line in page(runs).splitlines():
        if line.startswith("|") and any(value in line for value in ("77.91", "47.81", "93.14")):
            assert cells(line)[1].startswith("*paper, ")
            assert all(c.startswith("*") and c.endswith("*") for c in cells(line)[1:] if c)


def test_the_page_shows_values_intervals_and_counts(runs: Path) -> None:
    record = make_record(runs, accuracy=60)
    reference = make_record(runs, bits="FP", accuracy=90)
    lines = section(page(runs), "### mini_llava, W4A4").splitlines()
    rows = [cells(line) for line in lines if line.startswith("|")]
    classes = record.metrics["classes"]
    assert rows[2] == ["", "questions", *(str(row["n"]) for row in classes.values()), ""]
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


def test_the_share_of_cut_answers_is_shown(runs: Path) -> None:
    record = make_record(runs)
    metrics = {**record.metrics, "cut": 12.345}
    write_record(record.path, record.config, record.run, metrics, record.predictions, record.layers)
    lines = section(page(runs), "### mini_llava, W4A4").splitlines()
    rows = [cells(line) for line in lines if line.startswith("|")]
    (header,) = (row for row in rows if "unparsable, %" in row)
    (cost,) = (row for row in rows if row[0] == "RTN")
    assert dict(zip(header, cost, strict=True))["cut, %"] == "12.35"


def test_a_class_without_questions_is_no_fault(runs: Path) -> None:
    record = make_record(runs, n=3)
    empty = [name for name, row in record.metrics["classes"].items() if row["n"] == 0]
    assert empty
    frame = build([record]).set_index("class")
    assert frame.loc[empty, "accuracy"].isna().all()
    assert "| -" in page(runs)


def planted(change: dict[str, Any]) -> list[dict[str, Any]]:
    layers = make_layers("W4A4")
    layers[3] |= change
    return layers


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"input_levels": 512}, "512 input values per scale, 16 allowed"),
        ({"weight_levels": 17}, "17 weight values per scale, 16 allowed"),
        ({"weight_levels": 0}, "weight never seen"),
        ({"w_bits": 8, "weight_levels": 200}, "8 bits per weight value"),
        ({"a_bits": 8}, "8 bits per input value"),
    ],
)
def test_a_row_whose_layers_exceed_its_bits_is_refused(
    runs: Path, change: dict[str, Any], reason: str
) -> None:
    make_record(runs, bits="FP")
    bad = make_record(runs, "AWQ", layers=planted(change))
    make_record(runs, "RTN")
    frame = build(find_records(runs))
    assert set(frame["method"]) == {"FP", "RTN"}
    text = page(runs)
    assert f"(`{bad.name}`): {LAYERS[3]}: {reason}" in section(text, "## Refused rows")
    assert "AWQ" not in section(text, "## mini_llava")
    assert bad.name not in (runs.parent / "out" / "table2.csv").read_text()


def test_fewer_bits_than_claimed_are_no_fault(runs: Path) -> None:
    make_record(runs, layers=planted({"w_bits": 2, "weight_levels": 4}))
    assert set(build(find_records(runs))["method"]) == {"RTN"}


def test_a_row_without_a_whole_proof_is_refused(runs: Path) -> None:
    make_record(runs, "RTN")
    make_record(runs, "AWQ", layers=[])
    make_record(runs, "QLoRA", layers=make_layers("W4A4")[:-2])
    refused = {left.record.method: left.reason for left in select(find_records(runs)).refused}
    assert refused["AWQ"] == "its proof of bits is empty"
    assert refused["QLoRA"].startswith(f"{LAYERS[3]}: missing from the proof, which mini_llava-")
    assert refused["QLoRA"].endswith("(and 1 more)")
    assert set(build(find_records(runs))["method"]) == {"RTN"}


def broken(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(classes: dict[str, Any]) -> None:
        classes[name][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (broken("IMG", "accuracy", float("nan")), "accuracy of class IMG is None"),
        (broken("SOC", "ci_high", float("inf")), "ci_high of class SOC is None"),
        (broken("NO", "accuracy", 130.0), "accuracy of class NO is 130.0"),
        (broken("Avg", "accuracy", 99.0), "do not follow from its predictions"),
        (lambda classes: classes.pop("G1-6"), "class G1-6 is missing"),
    ],
)
@pytest.mark.parametrize("bits", ["FP", "W4A4"])
def test_broken_numbers_are_refused(
    runs: Path, bits: str, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    make_record(runs, bits=bits, metrics=change)
    (left,) = select(find_records(runs)).refused
    assert reason in left.reason
    assert build(find_records(runs)).empty
    assert reason in section(page(runs), "## Refused rows")


def test_a_missing_reference_is_said(runs: Path) -> None:
    make_record(runs)
    make_record(runs, model="mini_moe_llava")
    make_record(runs, bits="FP", model="mini_moe_llava")
    text = page(runs)
    sentence = "has no full-precision record"
    assert f"mini_llava {sentence}" in section(text, "## mini_llava, which")
    assert sentence not in section(text, "## mini_moe_llava")


def test_the_newest_record_of_a_cell_is_shown(runs: Path) -> None:
    old = make_record(runs, name="a-new-name", accuracy=10, finished="2026-01-01T00:00:00+00:00")
    new = make_record(runs, name="a-name", accuracy=50, finished="2026-02-01T00:00:00+00:00")
    assert set(build([old, new])["run"]) == set(build([new, old])["run"]) == {"a-name"}
    notes = section(page(runs), "## Records not shown")
    assert "(`a-new-name`): a-name is the newer record of this cell" in notes


def test_an_older_record_never_stands_in_for_one_without_proof(runs: Path) -> None:
    make_record(runs, name="old", finished="2026-01-01")
    make_record(runs, name="new", finished="2026-02-01", layers=[])
    assert build(find_records(runs)).empty


def test_a_quick_try_is_not_mixed_in(runs: Path) -> None:
    for method, bits in (("FP", "FP"), ("RTN", "W4A4"), ("RTN", "W6A6")):
        make_record(runs, method, bits)
    make_record(runs, name="try", n=5, finished="2026-09-01", evaluation={"limit": 5})
    make_record(runs, bits="FP", name="try-fp", n=5, finished="2026-09-01", evaluation={"limit": 5})
    make_record(
        *(runs, "AWQ"),
        name="other",
        quantizer={"weight": {"granularity": "per_channel"}, "p": 0.5},
    )
    frame = build(find_records(runs))
    assert set(frame["run"]).isdisjoint({"try", "try-fp", "other"})
    assert set(frame[frame["class"] == "Avg"]["n"]) == {300}
    notes = section(page(runs), "## Records not shown")
    assert "(`try`): another setting: evaluation.limit is 5, not null" in notes
    assert "(`try-fp`): another setting: evaluation.limit is 5, not null" in notes
    assert "quantizer.weight.granularity is per_channel, not per_group" in notes


def test_retrained_weights_supersede_the_old_ones_together(runs: Path) -> None:
    for bits in ("FP", "W6A6", "W4A4"):
        make_record(runs, bits=bits, weights="old", name=f"old-{bits}")
    make_record(runs, bits="W4A4", weights="new", name="new", finished="2026-02-01")
    assert set(build(find_records(runs))["run"]) == {"new"}
    assert section(page(runs), "## Records not shown").count("new has newer weights or data") == 3


def test_the_usual_parameters_of_a_method_are_shown(runs: Path) -> None:
    for bits in ("W6A6", "W4A4"):
        make_record(runs, "AWQ", bits, name=f"usual-{bits}", parameters={"grid": 20})
    make_record(runs, "AWQ", name="unusual", finished="2027-01-01", parameters={"grid": 3})
    assert set(build(find_records(runs))["run"]) == {"usual-W6A6", "usual-W4A4"}
    notes = section(page(runs), "## Records not shown")
    assert "(`unusual`): usual-W4A4 is shown: grid is 3, not 20" in notes


def test_rows_follow_the_paper(runs: Path) -> None:
    methods = ["Q-VLM", "Zebra", "Layer-wise", "QLoRA", "AWQ", "RTN"]
    for method in methods:
        make_record(runs, method, n=10)
    for bits in ("W2A4", "W6A6", "W8A8", "FP"):
        make_record(runs, bits=bits, n=10)
    frame = build(find_records(runs))
    assert list(frame["bits"].unique()) == ["FP", "W8A8", "W6A6", "W4A4", "W2A4"]
    order = ["RTN", "AWQ", "QLoRA", "Layer-wise", "Zebra", "Q-VLM"]
    assert list(frame[frame["bits"] == "W4A4"]["method"].unique()) == order


def test_methods_are_compared_question_by_question(runs: Path) -> None:
    """Against scipy's binomial test on counts taken with a merge."""
    methods = {"RTN": 60.0, "AWQ": 64.0, "Layer-wise": 70.0, "Q-VLM": 72.0}
    records = [
        make_record(runs, method, accuracy=accuracy, seed=index)
        for index, (method, accuracy) in enumerate(methods.items())
    ]
    by_method = {record.method: record.predictions for record in records}
    made, impossible = compare(records)
    assert impossible == []
    assert [(c.first, c.second) for c in made] == [
        ("Q-VLM", name) for name in ("RTN", "AWQ", "Layer-wise")
    ]
    for c in made:
        merged = by_method[c.first].merge(by_method[c.second], on="question_id")
        only_first = int((merged["correct_x"] & ~merged["correct_y"]).sum())
        only_second = int((~merged["correct_x"] & merged["correct_y"]).sum())
        assert (c.test.only_a, c.test.only_b) == (only_first, only_second)
        oracle = binomtest(only_first, only_first + only_second).pvalue
        assert c.test.p_value == pytest.approx(oracle)
        assert c.p_holm >= c.test.p_value
        difference = 100 * (merged["correct_x"].mean() - merged["correct_y"].mean())
        assert c.difference.difference == pytest.approx(difference)
        assert c.difference.low < difference < c.difference.high
    smallest = min(made, key=lambda c: c.test.p_value)
    assert smallest.p_holm == pytest.approx(3 * smallest.test.p_value)
    assert smallest.verdict == "Q-VLM ahead"
    lines = section(page(runs), "### mini_llava, W4A4").splitlines()
    (row,) = (cells(line) for line in lines if line.startswith("| Q-VLM - RTN "))
    (c,) = (c for c in made if c.second == "RTN")
    assert row[3:5] == [str(c.test.only_a), str(c.test.only_b)]
    assert float(row[1]) == pytest.approx(c.difference.difference, abs=0.006)
    assert float(row[6]) == pytest.approx(c.p_holm, rel=0.5, abs=6e-5)


def test_without_the_hero_everything_is_compared_with_the_baseline(runs: Path) -> None:
    for method, accuracy in (("RTN", 80), ("AWQ", 50), ("QLoRA", 80)):
        make_record(runs, method, accuracy=accuracy)
    made, _ = compare(select(find_records(runs)).shown)
    assert [(c.first, c.second, c.verdict) for c in made] == [
        ("AWQ", "RTN", "RTN ahead"),
        ("QLoRA", "RTN", "not told apart"),
    ]
    assert made[1].test.p_value == 1
    assert "| AWQ - RTN " in page(runs)


def test_one_method_is_compared_with_nothing(runs: Path) -> None:
    make_record(runs)
    assert "There are no two methods to compare." in page(runs)


def test_different_questions_are_not_compared(runs: Path) -> None:
    """By identity of the questions, whatever their order."""
    first, second = make_record(runs, "RTN"), make_record(runs, "AWQ", n=200)
    assert paired(first, second) is None
    _, impossible = compare([first, second])
    assert impossible == ["AWQ and RTN were not asked the same questions"]
    second.predictions.loc[:, "question_id"] = [f"test-{i + 1}" for i in range(200)]
    assert paired(first, second) is None
    same = make_record(runs, "QLoRA", seed=4)
    before = paired(first, same)
    assert before is not None
    shuffled = same.predictions.sample(frac=1, random_state=0)
    again = Record(same.path, same.config, same.run, same.metrics, shuffled, same.layers)
    after = paired(first, again)
    assert after is not None
    assert np.array_equal(before, after)
    relabelled = same.predictions.assign(answer=(same.predictions["answer"] + 1) % 3)
    other = Record(same.path, same.config, same.run, same.metrics, relabelled, same.layers)
    assert paired(first, other) is None


def test_the_printed_numbers_that_do_not_add_up_are_named(runs: Path) -> None:
    make_record(runs, "AWQ")
    assert "## The printed numbers" in page(runs)
    assert "LLaVA-13B W4A4 AWQ: Avg is 77.91" in page(runs)
    make_record(runs, "QLoRA")
    assert "TXT is 78.25 in one copy of the paper and 78.35 in another" in page(runs)


def test_the_page_says_how_it_was_made_and_nothing_of_when(runs: Path) -> None:
    for bits in ("FP", "W4A4"):
        make_record(runs, bits=bits)
    text = page(runs)
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
    assert page(runs) == text


def test_markdown_columns_line_up_and_pipes_are_escaped() -> None:
    lines = table(["a", "b|c"], [["long cell", "1"], ["|", "22"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0] == "| a         | b\\|c |"
    assert lines[1] == "| :-------- | ---: |"
    assert lines[3] == "| \\|        |   22 |"


def test_the_command_prints_the_page_and_writes_both(
    runs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_record(runs, bits="FP")
    make_record(runs, "AWQ", layers=[])
    out = runs.parent / "new" / "out"
    assert main(["--runs", str(runs), "--out", str(out), "--command", "make table2"]) == 0
    assert sorted(file.name for file in out.iterdir()) == ["table2.csv", "table2.md"]
    printed = capfd.readouterr()
    assert printed.out == (out / "table2.md").read_text()
    assert "make table2" in printed.out
    assert printed.err.startswith("warning: refused mini_llava-awq-w4a4")
    frame = pd.read_csv(out / "table2.csv")
    pd.testing.assert_frame_equal(frame, build(find_records(runs)), check_dtype=False)
    assert main(["--runs", str(runs), "--out", str(out)]) == 0
    assert f"`python -m qvlm.tables.table2 --runs {runs} --out {out}`" in capfd.readouterr().out


@pytest.mark.parametrize("exists", [True, False])
def test_no_records_are_the_users_error(
    runs: Path, exists: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    if exists:
        runs.mkdir()
    out = runs.parent / "out"
    assert main(["--runs", str(runs), "--out", str(out)]) == 2
    out_text, err = capfd.readouterr()
    assert out_text == ""
    assert err.count("\n") == 1
    assert str(runs) in err
    assert "--runs" in err
    assert not out.exists()


def test_a_damaged_record_stops_the_table(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = make_record(runs).path
    (path / "metrics.json").write_text("{}")
    assert main(["--runs", str(runs), "--out", str(runs.parent / "out")]) == 1
    err = capfd.readouterr().err
    assert err.startswith("error: ")
    assert str(path) in err
    with pytest.raises(RunError):
        find_records(runs)


def test_an_unwritable_folder_keeps_the_old_table(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_record(runs)
    out = runs.parent / "out"
    write(find_records(runs), out, "before")
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(table2.Path, "replace", fail)
    with pytest.raises(UserError, match=r"--out: .* \(No space left on device\)"):
        write(find_records(runs), out, "after")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    (runs.parent / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        write(find_records(runs), runs.parent / "file", "make table2")


def test_an_unknown_model_of_the_paper_is_the_users_error(runs: Path) -> None:
    record = make_record(runs)
    record.config["model"]["stands_for"] = "llava_99b"
    with pytest.raises(UserError, match=r"llava_99b.*llava_13b"):
        build([record])

"""Two runs are compared in everything that may explain why they differ, and answer by answer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from qvlm.records.record import Record
from qvlm.tables import diff
from qvlm.tables.answers import write_answers
from tests.helpers.pages import cells, section
from tests.helpers.records import LAYERS, make_layers, make_record


@pytest.fixture
def record(runs: Path) -> Record:
    return make_record(runs, generated=True)


def changed(record: Record, **parts: Any) -> Record:
    return replace(record, run={**record.run, **parts})


def rows(text: str, title: str) -> list[list[str]]:
    own = section(text, title).splitlines()
    return [cells(line) for line in own if line.startswith("| ")][2:]


def test_a_run_does_not_differ_from_itself(record: Record) -> None:
    text = diff.explain(record, record)
    assert "records of the same cell" in text
    same = "configuration, code, weights and data, versions, hardware, calibration"
    assert f"The same in both: {same}." in text
    assert "Answers that differ: 0 (0.00 %)" in text
    assert "|" not in text


def test_runs_on_text_and_tasks_are_compared_by_their_measures(runs: Path) -> None:
    sums = pd.DataFrame({"document": ["a", "b"], "tokens": [90, 110], "nll": [270.0, 330.0]})
    one = make_record(runs, documents=sums)
    other = make_record(runs, name="b", documents=sums.assign(kl=[9.0, 11.0], agreement=[45, 55]))
    assert rows(diff.explain(one, other), "## Measures") == [
        ["perplexity", "20.0855", "20.0855"],
        ["kl", "-", "0.1"],
        ["agreement", "-", "50"],
    ]
    first, second = (
        make_record(runs, name=f"t{index}", tasks={"x": value})
        for index, value in ((0, 0.5), (1, 0.75))
    )
    assert rows(diff.explain(first, second), "## Measures") == [["x, accuracy", "0.5", "0.75"]]
    mixed = rows(diff.explain(one, make_record(runs, name="p", accuracy=0)), "## Measures")
    assert mixed == [["perplexity", "20.0855", "-"], ["accuracy, %", "-", "0.00"]]


@pytest.mark.parametrize(
    ("title", "part", "row"),
    [
        ("Configuration", {"influences": {"seed": 5}}, ["influences.seed", "0", "5"]),
        ("Code", {"code": "f" * 64}, ["code", "c", "f" * 12]),
        ("Weights and data", {"files_hashed": {"model": "x"}}, ["files_hashed.model", "w", "x"]),
        ("Versions", {"versions": {"torch": "3"}}, ["versions.torch", "2.13.0", "3"]),
        ("Hardware", {"threads": 7}, ["threads", "2", "7"]),
        ("Calibration", {"calibration": {"ids": [1, 5]}}, ["calibration.ids", "[1,5,8]", "[1,5]"]),
    ],
)
def test_a_reason_is_named_with_both_values(
    record: Record, title: str, part: dict[str, Any], row: list[str]
) -> None:
    (key,) = part
    value = {**record.run[key], **part[key]} if isinstance(part[key], dict) else part[key]
    text = diff.explain(record, changed(record, **{key: value}))
    (found,) = rows(text, f"## {title}")
    assert [cell.replace(" ", "") for cell in found] == [cell.replace(" ", "") for cell in row]
    assert f"{title.lower()}" not in text.partition("The same in both")[2].partition("\n")[0]


def test_layers_with_other_levels_are_named(record: Record) -> None:
    layers = make_layers("W4A4")
    layers[2]["input_levels"] = 9
    text = diff.explain(record, replace(record, layers=layers[:-1]))
    assert rows(text, "## Proof of bits") == [
        [LAYERS[2], "16 / 15", "16 / 9"],
        [LAYERS[-1], "16 / 15", "-"],
    ]


def test_answers_are_counted_both_ways(runs: Path, record: Record) -> None:
    other = make_record(runs.parent / "other", "AWQ", accuracy=85.0, seed=3, generated=True)
    other = changed(other, hash="1")
    text = diff.explain(record, other)
    assert "different cells" in text
    a, b = record.predictions, other.predictions
    differing = a["prediction"].fillna(-1) != b["prediction"].fillna(-1)
    only_a, only_b = (a["correct"] & ~b["correct"]).sum(), (b["correct"] & ~a["correct"]).sum()
    neither = (differing & ~a["correct"] & ~b["correct"]).sum()
    assert neither > 0
    assert f"Answers that differ: {differing.sum()} " in text
    assert f"the first only: {only_a}, in the second only: {only_b}, in neither" in text
    assert f"though they differ: {neither} " in text
    found = rows(text, "## Answers")
    assert [row[0] for row in found] == list(a["question_id"][differing])
    first = a.index[differing][0]
    assert found[0][4] == "ABCDEFGHIJ"[a["answer"][first]]
    assert len(rows(diff.explain(record, other, 5), "## Answers")) == 5
    assert f"{differing.sum() - 5} more differ" in diff.explain(record, other, 5)


def test_only_shared_questions_are_compared(runs: Path, record: Record) -> None:
    part = make_record(runs.parent / "part", generated=True, n=100)
    assert "Questions asked of both: 100, of 300 and 100" in diff.explain(record, part)
    others = record.predictions.assign(answer=9)
    assert "not asked the same questions (300 and 300)" in diff.explain(
        record, replace(record, predictions=others)
    )


def test_the_command_takes_records_and_committed_answers(
    record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_answers(tmp_path / "answers", [record])
    (file,) = (tmp_path / "answers").iterdir()
    assert diff.main([str(record.path), str(file)]) == 0
    assert "Answers that differ: 0 (0.00 %)" in capsys.readouterr().out
    assert diff.main([str(record.path), str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a run. Give the folder of a record" in capsys.readouterr().err


def test_a_small_p_value_is_not_zero(runs: Path, record: Record) -> None:
    other = make_record(runs.parent / "other", accuracy=0, generated=True)
    text = diff.explain(record, other)
    assert "p = 0.0000" not in text
    assert "e-" in text.partition("exact McNemar test, p = ")[2][:8]

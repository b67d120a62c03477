"""Table 4 of toys: every packed checkpoint is traced to its record, timed and weighed."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from qvlm.packing.kernels import names
from qvlm.records.record import Record
from qvlm.tables.cost import COLUMNS
from qvlm.tables.table4 import measure
from qvlm.tables.table4.__main__ import main
from qvlm.tables.table4.subjects import Subject
from tests.helpers.cells import SPLITS, run

pytestmark = [pytest.mark.usefixtures("tracked"), pytest.mark.instruction_set]


def test_the_table(
    cell: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    monkeypatch.setattr(
        measure, "load_scienceqa", lambda source, split, limit, seed: SPLITS[split].select([0, 1])
    )
    run(cell("method=fp"))
    run(cell("bits=w4a4"))
    for bits in ("w8a8", "w4a4"):
        run(cell(f"bits={bits}", f"save_packed={results}/packed/toy-rtn-{bits}"))
    origin = json.loads((results / "packed" / "toy-rtn-w4a4" / "qvlm.json").read_text())
    for name, content in (("stray", origin | {"hash": "0" * len(origin["hash"])}), ("odd", [5])):
        (results / "packed" / name).mkdir()
        (results / "packed" / name / "qvlm.json").write_text(json.dumps(content))

    runs = ["--runs", str(results / "runs"), "--out", str(results)]
    assert main([*runs, "--repeats", "2", "--questions", "2"]) == 0
    warnings = capsys.readouterr().err
    assert "stray: its cell is not recorded" in warnings
    assert "warning: refused" in warnings and "odd" in warnings
    assert "note: table4 is not kept for make verify" in warnings  # the toy's problems are planted
    frame = pd.read_csv(results / "table4.csv")
    assert tuple(frame.columns) == COLUMNS
    assert list(frame["bits"]) == ["FP", "W8A8", "W4A4"]
    assert (frame["speed_ratio"][0], frame["memory_ratio"][0]) == (1, 1)
    assert bool((frame["speed_ratio_low"] <= frame["speed_ratio_high"]).all())
    assert frame["weight_gib"].is_monotonic_decreasing
    parts = frame["vision_s"] + frame["prefill_s"] + frame["decode_s"]
    # Medians of the parts, so only about their sum.
    assert bool((parts < 2 * frame["seconds_per_question"]).all())
    text = (results / "table4.md").read_text()
    # Which kernels ran is for the machine to choose; that they are named, and counted, is not.
    for bits in ("W8A8", "W4A4"):
        (ran,) = re.findall(rf"toy {bits} RTN ([^;\n]+)", text)
        calls = dict(part.split() for part in ran.split(", "))
        assert calls.keys() <= set(names()) - {"auto"}
        assert all(int(count) > 0 for count in calls.values())
    assert "GPU: not measured" in text
    assert text.count("100.00 %") == 1


def test_without_packed_models_there_is_no_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--runs", str(tmp_path / "runs")]) == 2
    assert f"{tmp_path / 'packed'} holds no packed models" in capsys.readouterr().err
    assert main(["--repeats", "0"]) == 2
    assert "--repeats=0 is not a whole number" in capsys.readouterr().err


def test_questions_that_are_answered_otherwise_are_named(cell: Any, tmp_path: Path) -> None:
    record = Record.load(run(cell("bits=w4a4")))
    changed = record.predictions.copy()
    changed.loc[3, "prediction"] = (changed["prediction"].fillna(0)[3] + 1) % 5
    other = replace(record, predictions=changed)
    subject = Subject(record, "", "cpu")
    assert subject.disagreements() == {}
    expected = [str(changed["question_id"][3])]
    both = {"simulated": other, "exact": record}
    assert replace(subject, others=both).disagreements() == {"simulated": expected, "exact": []}
    fewer = replace(record, predictions=record.predictions[1:])
    assert replace(subject, others={"exact": fewer}).disagreements() == {}

"""Table 3: planted records of both kinds beside the paper's numbers."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from qvlm.records.record import Record
from qvlm.tables import table3
from tests.helpers.records import make_layers, make_record

MODEL = "llava_v15_7b"


def planted(runs: Path, method: str, bits: str, **accuracy: float) -> Record:
    """A record of the table: on tasks, if there are accuracies of tasks, and else on problems."""
    more: dict[str, Any] = {"tasks": accuracy} if accuracy else {"accuracy": 60.0}
    kind, group = ("tasks", "table3") if accuracy else ("problems", "table3_sqa")
    name = f"{method}-{bits}-{kind}"
    return make_record(runs, method, bits, MODEL, name=name, group=group, **more)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    planted(runs, "FP", "FP")
    planted(runs, "FP", "FP", vizwiz=0.5, vqav2=0.75)
    planted(runs, "AWQ", "W4A4", vizwiz=0.25, vqav2=0.5)
    make_record(runs, "RTN", name="another")  # of another table
    return runs


def lines_of(page: str) -> list[list[str]]:
    rows = [line for line in page.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_what_is_measured_stands_over_what_the_paper_prints(runs: Path) -> None:
    selection = table3.choose(runs)
    page = table3.page(selection, "make table3")
    header, _, full, paper, quantized, printed = lines_of(page)
    assert header == ["method", "bits", "SQA", "VizWiz", "VQAv2", "questions"]
    assert full[:2] == ["**FP**", "FP"]
    accuracy = next(r for r in selection.shown if r.kind == "problems").metrics["classes"]["IMG"]
    assert full[2].startswith(f"{accuracy['accuracy']:.2f} (")
    assert full[3:5] == ["50.00 (12.50)", "75.00 (12.50)"]
    assert full[5] == f"{accuracy['n']}, 2, 2"
    assert paper[2:5] == ["*66.79*", "*49.87*", "*78.50*"]
    assert quantized[:3] == ["**AWQ**", "W4A4", "not measured"]
    assert printed[2:5] == ["*56.73*", "*44.29*", "*71.89*"]
    assert "another" not in page
    assert "`make table3`" in page


def test_false_bits_are_refused(runs: Path) -> None:
    layers = make_layers("W4A4")
    layers[2]["input_levels"] = 17
    tasks = {"vizwiz": 0.9, "vqav2": 0.9}
    false = {"layers": layers, "tasks": tasks, "group": "table3"}
    make_record(runs, "QLoRA", "W4A4", MODEL, name="false", **false)
    page = table3.page(table3.choose(runs), "x")
    assert "false" in page.partition("##")[2]
    assert "90.00" not in page


def test_the_command_writes_a_page_and_a_csv(
    runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [f"--runs={runs}", f"--out={tmp_path}"]
    assert table3.main(words) == 0
    csv = pd.read_csv(tmp_path / "table3.csv")
    assert list(csv["dataset"]) == ["SQA", "VizWiz", "VQAv2", "VizWiz", "VQAv2"]
    row = csv.query("method == 'AWQ' and dataset == 'VQAv2'").iloc[0]
    assert (row["accuracy"], row["paper_accuracy"], row["n"]) == (50.0, 71.89, 2)
    assert (tmp_path / "table3.md").read_text() == capfd.readouterr().out
    assert table3.main([f"--runs={tmp_path}/none", f"--out={tmp_path}"]) == 2
    assert "holds no records of Table 3" in capfd.readouterr().err

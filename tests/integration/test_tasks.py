"""Cells on tasks of lm-eval: recorded, found again, packed, and started from the command line."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from qvlm.cell.identity import Cell
from qvlm.errors import RunError, UserError
from qvlm.evaluation.scores import scores
from qvlm.records.record import Record, find_records
from tests.helpers.cells import Tracked, run
from tests.helpers.tasks import PICTURE_TASKS, TEXT_TASKS, write_tasks


@pytest.fixture
def on_tasks(cell: Any, tracked: Tracked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the configuration of a cell of the toy on local tasks."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = write_tasks(tmp_path / "tasks")
    names = f"tasks.names=[{','.join([*TEXT_TASKS, *PICTURE_TASKS])}]"
    free = "evaluation.max_new_tokens=null"
    return lambda *words: cell(names, f"tasks.include_path={folder}", free, *words)


def test_a_cell_on_tasks_is_recorded_with_its_proof(on_tasks: Any, tmp_path: Path) -> None:
    config = on_tasks("method=rtn", "bits=w4a4", "evaluation.limit=3")
    record = Record.load(run(config))
    assert record.kind == "tasks"
    assert record.layers
    assert record.run["exceeding"] == []
    assert record.run["versions"]["lm_eval"]
    assert {task for task, *_ in scores(record.metrics["tasks"]["results"])} == {
        *TEXT_TASKS,
        *PICTURE_TASKS,
    }
    assert (record.predictions.groupby("task")["doc_id"].nunique() == 3).all()
    longest = record.predictions.query("task == 'toy_generate'")["responses"].map(json.loads)
    assert max(len(text.split()) for (text,) in longest) > 4  # the task's own limit holds

    assert Cell.of(config).is_recorded()
    assert not Cell.of(on_tasks("method=rtn", "bits=w4a4")).is_recorded()  # another limit
    (tmp_path / "tasks" / "questions.jsonl").open("a").write("\n")
    assert not Cell.of(config).is_recorded()  # its data are others
    assert find_records(record.path.parent) == []  # no page of problems shows it


def test_a_packed_model_gives_the_same(on_tasks: Any, tmp_path: Path) -> None:
    packed = f"save_packed={tmp_path}/packed"
    first = Record.load(run(on_tasks("method=rtn", "bits=w4a4", packed)))
    again = Record.load(run(on_tasks(f"model.packed={tmp_path}/packed")))
    assert again.run["method"] == "RTN"
    assert again.metrics == first.metrics
    assert again.predictions.equals(first.predictions)
    assert sum(again.run["kernels"].values()) > 0


def test_full_precision_and_damage(on_tasks: Any) -> None:
    path = run(on_tasks("method=fp", "evaluation.limit=2"))
    assert Record.load(path).layers == []
    metrics = json.loads((path / "metrics.json").read_text())
    (path / "metrics.json").write_text(json.dumps({"tasks": {}}))
    with pytest.raises(RunError, match="not a complete record|not what the run wrote"):
        Record.load(path)
    assert metrics["tasks"]["n-samples"]["toy_choice"]["effective"] == 2


def test_a_folder_that_is_missing_is_named(on_tasks: Any) -> None:
    with pytest.raises(UserError, match=r"tasks.include_path=/nowhere is not a folder"):
        run(on_tasks("tasks.include_path=/nowhere"))

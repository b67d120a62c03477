"""lm-eval's own command line and functions find our models, and give the numbers of `qvlm eval`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from qvlm import lm_eval_model
from qvlm.errors import RunError, UserError
from qvlm.quantization import LayerBits
from qvlm.records.record import Record
from tests.helpers.cells import Tracked, run
from tests.helpers.tasks import write_tasks

TASKS = ["toy_choice", "toy_pictures"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluator, "add_env_info", lambda _: None)  # it starts processes
    return write_tasks(tmp_path / "tasks")


@pytest.fixture
def record(cell: Any, tracked: Tracked, tasks: Path, tmp_path: Path) -> Record:
    """A cell on the tasks that saved its packed model."""
    words = [f"tasks.names=[{','.join(TASKS)}]", f"tasks.include_path={tasks}"]
    words += ["evaluation.max_new_tokens=null", f"save_packed={tmp_path}/packed"]
    return Record.load(run(cell("method=rtn", "bits=w4a4", *words)))


def numbers(results: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task} {name}": value
        for task, metrics in results.items()
        for name, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in name
    }


def test_a_packed_model_gives_the_numbers_of_its_cell(
    record: Record, tasks: Path, tmp_path: Path
) -> None:
    found = lm_eval.simple_evaluate(
        model="qvlm",
        model_args=f"packed={tmp_path}/packed",
        tasks=TASKS,
        batch_size=3,
        device="cpu",
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    assert numbers(found["results"]) == numbers(record.metrics["tasks"]["results"])
    assert (found["config"]["method"], found["config"]["bits"]) == ("RTN", "W4A4")


def test_a_model_is_quantized_in_memory_and_proven(
    checkpoint: Path, tracked: Tracked, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"model.weight_group_size": 16, "model.vision_weight_group_size": 16}
    options = {"model": "mini_llava", "model.path": checkpoint, "device": "cpu", **sizes}
    options |= {"calibration.samples": 4, "batch_size": 2}
    made = lm_eval_model.QvlmModel(**options, method="rtn", bits="w3a3")
    assert made.model.bits.label == "W3A3"
    assert lm_eval_model.QvlmModel(**options, method="fp").model.bits.is_full_precision
    broken = LayerBits("language.up", 4, 4, 99, 3, False)
    monkeypatch.setattr(
        lm_eval_model.api, "prove", lambda model: lm_eval_model.api.Proof([broken], ["language.up"])
    )
    with pytest.raises(RunError, match=r"language\.up is not proven to compute with W4A4 values"):
        lm_eval_model.QvlmModel(**options)


def test_what_it_needs_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    for words in ({}, {"packed": "a", "model": "b"}):
        with pytest.raises(UserError, match="either packed=FOLDER or model=NAME"):
            lm_eval_model.QvlmModel(**words)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="batch_size=auto is not accepted"):
        lm_eval_model.QvlmModel(packed="a", batch_size="auto")
    assert lm_eval_model.main(["run", "--help"]) == 0
    assert "--model_args" in capfd.readouterr().out


def test_the_command_line_of_lm_eval_knows_it(record: Record, tasks: Path, tmp_path: Path) -> None:
    words = ["--model", "qvlm", "--model_args", f"packed={tmp_path}/packed", "--tasks", *TASKS]
    words += ["--include_path", str(tasks), "--output_path", str(tmp_path / "out"), "--limit", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "qvlm", "lm-eval", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|toy_choice" in done.stdout
    (written,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(written.read_text())["config"]["bits"] == "W4A4"

"""Several processes give the record that one gives, and end together."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch

from qvlm.cell import inputs as prepare
from qvlm.cli import main
from qvlm.data import miniature
from qvlm.data.scienceqa import COLUMNS
from qvlm.errors import UserError
from qvlm.evaluation.adapter import InMemoryModel
from qvlm.records.record import find_records
from qvlm.runtime import workers

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--main_process_port=0"]
LAUNCH += ["--mixed_precision=no", "--dynamo_backend=no"]
LONGEST = 300  # seconds until a launch counts as hanging


def launch(*words: str) -> "subprocess.CompletedProcess[str]":
    """`accelerate launch` with two processes, which a machine without a GPU has on its CPU."""
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LONGEST,
    )


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of cells of a few problems, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for split, count in (("test", 11), ("train", 8)):
        problems = miniature.generate(split, count, seed=0)
        rows = datasets.Dataset.from_list(problems, features=COLUMNS)
        rows.to_parquet(tmp_path / "data" / f"{split}.parquet")
    options = [
        "evaluation.batch_size=2",
        "data=folder",
        "data.source=data",
        "calibration.images=any",
        "calibration.samples=4",
    ]
    options += ["tracking=off", "threads=1", "device=cpu"]
    return options


def test_two_processes_write_what_one_writes(options: list[str], monkeypatch: Any) -> None:
    sweep = ["-m", "method=fp,rtn", "execution=simulated,packed", *options]
    assert main([*sweep, "results_dir=one"]) == 0
    ask = InMemoryModel._batch

    def interrupted(self: InMemoryModel, start: int, requests: Any) -> list[str]:
        if start == 4:
            raise KeyboardInterrupt
        return ask(self, start, requests)

    with monkeypatch.context() as patch:
        patch.setattr(InMemoryModel, "_batch", interrupted)
        assert main([*sweep, "results_dir=two"]) == 130
    launched = launch(str(ROOT / "run.py"), *sweep, "results_dir=two")
    assert launched.returncode == 0, launched.stderr

    alone, together = (find_records(f"{folder}/runs") for folder in ("one", "two"))
    assert [record.name for record in together] == [record.name for record in alone]
    assert [record.bits for record in alone] == ["FP", "W4A4", "W4A4"]
    for one, two in zip(alone, together, strict=True):
        pd.testing.assert_frame_equal(two.predictions, one.predictions)
        assert two.metrics == one.metrics
        assert two.layers == one.layers
        assert two.run["kernels"] == one.run["kernels"]
        assert (one.run["processes"], one.run["questions_per_process"]) == (1, [11])
        assert two.run["processes"] == 2
        assert len(two.run["questions_per_process"]) == 2
        assert sum(two.run["questions_per_process"]) == 11
    # On a busy machine one process may be done before the other has begun, but not every time.
    assert any(min(record.run["questions_per_process"]) > 0 for record in together)
    resumed = [record.run["stages"]["evaluate"].get("resumed_questions") for record in together]
    assert resumed == [4, None, None]
    wrote = [line for line in launched.stdout.splitlines() if line.startswith("wrote ")]
    assert wrote == [f"wrote {record.path}" for record in together]
    assert sorted(os.listdir("two/runs")) == [record.name for record in together]


def test_what_one_process_cannot_do_is_said_once(options: list[str]) -> None:
    rows = pd.read_parquet("data/test.parquet")
    rows.at[0, "image"] = {"bytes": b"no picture", "path": None}
    rows.to_parquet("data/test.parquet")
    launched = launch(str(ROOT / "run.py"), *options, "method=fp")
    assert launched.returncode != 0
    said = [line for line in launched.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, launched.stderr
    assert "data/test.parquet, row 0, column 'image': it does not decode" in said[0]
    # The launcher tells of the process that ended first. The other one may be aborted by the
    # collective operation in which it was left alone.
    assert "exitcode  : 2" in launched.stderr or "SIGABRT" in launched.stderr
    assert find_records("results/runs") == []


def test_functions_models_and_errors_go_from_one_process_to_the_other() -> None:
    launched = launch(str(ROOT / "tests" / "helpers" / "two_processes.py"))
    assert launched.returncode == 0, launched.stderr
    assert sorted(launched.stdout.split("\n")) == ["", "it holds", "left", "left"]


def test_alone_everything_is_here() -> None:
    assert workers.run_on_all_ranks(divmod, 7, 2) == [(3, 1)]
    with workers.WorkQueue(3) as numbers:
        assert list(numbers) == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        workers.run_on_all_ranks(divmod, 1, 0)


@pytest.mark.parametrize(
    ("device", "cards", "words"),
    [
        ("auto", 2, "3 processes need a GPU each, and this machine has 2"),
        ("cuda:1", 3, "device=cuda:1 is not for 3 processes. Choose one of: auto, cuda"),
        ("map", 3, "device=map is not for 3 processes"),
        ("cuda", 0, "device=cuda is not on this machine. Choose one of: auto, cpu"),
    ],
)
def test_each_process_has_a_card(monkeypatch: Any, device: str, cards: int, words: str) -> None:
    monkeypatch.setattr(workers, "world_size", lambda: 3)
    monkeypatch.setattr(workers, "local_world_size", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    with pytest.raises(UserError, match=words):
        prepare.find_device(device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [prepare.find_device(name) for name in ("auto", "cuda", "cpu")] == ["cuda:0"] * 2 + [
        "cpu"
    ]


def test_a_launcher_inside_a_launch_is_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(workers, "init", lambda: True)
    monkeypatch.setattr(workers, "shutdown", lambda: None)
    assert main(["-m", "method=fp,rtn", "launcher=joblib"]) == 2
    assert "launcher is not possible under accelerate launch" in capfd.readouterr().err

"""Launchers: their options, several processes of this machine, and a sweep of real cells."""

import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from joblib.externals.loky import get_reusable_executor

from qvlm.cell import identity
from qvlm.cell.identity import Cell
from qvlm.cli import main
from qvlm.data import miniature
from qvlm.data.scienceqa import COLUMNS
from qvlm.errors import RunError, UserError
from qvlm.records.locks import Held, Lock, Watch
from qvlm.records.record import find_records
from qvlm.sweep import job, local
from qvlm.sweep.launch import build
from qvlm.sweep.local import Auto, Here, Joblib, worker_device
from qvlm.sweep.ray import Ray
from qvlm.sweep.slurm import Slurm
from tests.helpers.configs import load
from tests.helpers.light_cells import run, workers


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_joblib_runs_all_and_returns_what_fails() -> None:
    good = ["a", "b", "c", "d", "e", "f", "g"]
    outcomes = run(Joblib(jobs=2), *good, "fail", "held")
    assert outcomes[:-2] == [Path(word) for word in good]
    assert str(outcomes[-2]) == "a layer is NaN"
    assert isinstance(outcomes[-1], Held)
    assert len(workers(*good)) <= 2
    assert str(sys.argv) in Path("a").read_text()


def test_joblib_goes_on_when_a_worker_is_killed(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = run(Joblib(jobs=2), "a", "die", "b", "c")
    assert [outcomes[0], *outcomes[2:]] == [Path(word) for word in "abc"]
    assert isinstance(outcomes[1], RunError)
    assert "the worker of mini_llava, rtn, W4A4 was killed" in str(outcomes[1])
    assert "a worker was killed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("-m launcher=foo", ["launcher=foo", "auto", "here", "joblib", "ray", "slurm"]),
        ("-m launcher=joblib launcher.jobs=0", ["launcher.jobs", "0", "at least 1"]),
        ("-m launcher=joblib launcher.jobs=many", ["launcher.jobs", "many", "Integer"]),
        ("-m launcher=joblib launcher.partition=long", ["launcher.partition", "jobs"]),
        ("-m launcher=here launcher.jobs=2", ["launcher.jobs"]),
        ("-m launcher=slurm", ["srun", "launcher.cluster=local"]),
        ("-m launcher=slurm launcher.cluster=pbs", ["launcher.cluster", "pbs", "slurm, local"]),
        ("-m launcher=slurm launcher.hours=0", ["launcher.hours", "above 0"]),
        ("-m launcher=slurm launcher.gpus=-1", ["launcher.gpus", "-1"]),
        ("-m launcher=ray launcher.cpus=0", ["launcher.cpus", "at least 1"]),
        ("-m launcher=here,joblib", ["launcher", "single value"]),
        ("-m launcher._target_=pathlib.Path", ["launcher._target_", "pathlib.Path"]),
        ("launcher=joblib", ["launcher", "-m"]),
    ],
)
def test_bad_options_are_one_sentence(
    line: str, words: list[str], elsewhere: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split(" ")) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert os.listdir(elsewhere) == []


@pytest.mark.parametrize(("kind", "package"), [(Slurm, "submitit"), (Ray, "ray")])
def test_a_missing_extra_is_named(
    kind: type, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=rf"needs {package}.* pip install .*\[{kind.__name__.lower()}\]"
    ):
        kind()


def test_workers_of_joblib_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    def device(worker: str, gpus: int, asked: str = "auto") -> str:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(multiprocessing.current_process(), "_name", worker)
        return worker_device(asked)

    assert [device(f"LokyProcess-{n}", 2) for n in (1, 2, 3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert device("LokyProcess-2", 1) == device("LokyProcess-2", 0) == "auto"
    assert device("LokyProcess-2", 4, "cuda:0") == "cuda:0"
    assert device("MainProcess", 4) == "auto"


def write_problems(folder: Path) -> None:
    """Writes a data set of 16 problems in each split."""
    folder.mkdir()
    for split in ("test", "train"):
        rows = datasets.Dataset.from_list(miniature.generate(split, 16, seed=0), features=COLUMNS)
        rows.to_parquet(folder / f"{split}.parquet")


COUNTING = """
import os
from qvlm.cell import identity
from qvlm.methods.rtn import RTN

identify = identity.identify

def counted(*arguments):
    with open("identified", "a") as file:
        file.write(f"{os.getpid()}\\n")
    return identify(*arguments)

identity.identify = counted

class Counting(RTN):
    name = "Counting"
"""


@pytest.mark.parametrize("launcher", ["here", "joblib"])
def test_a_sweep_identifies_each_cell_once(
    launcher: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in every process, from the moment it imports the method of the cells."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(elsewhere)])
    monkeypatch.setattr(identity, "identify", identity.identify)  # puts it back at the end
    monkeypatch.delitem(sys.modules, "counting", raising=False)
    (elsewhere / "counting.py").write_text(COUNTING)
    write_problems(elsewhere / "data")
    line = ["-m", "method._target_=counting.Counting", "data=folder", "data.source=data"]
    line += ["tracking=off", "threads=1", "calibration.samples=8", "bits=w4a4,w8a8"]
    try:
        assert main([*line, f"launcher={launcher}"]) == 0
    finally:
        get_reusable_executor().shutdown()  # its workers would serve other tests, and count there
    assert len(find_records("results/runs")) == 2
    assert (elsewhere / "identified").read_text().split() == [str(os.getpid())] * 2


def test_a_job_refuses_code_that_has_changed_since_it_was_planned(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell.of(load("device=cpu"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    outcome = job.Job(replace(cell, code="another"))()
    assert isinstance(outcome, RunError)
    assert "mini_llava, rtn, W4A4 has changed" in str(outcome)


def test_auto_is_the_default() -> None:
    assert build(load().launcher) == Auto()


@pytest.mark.parametrize(
    ("cores", "free", "options", "side_by_side"),
    [
        (4, 2**34, (), 3),  # as many as there are cells
        (2, 2**34, (), 2),
        (1, 2**34, (), 0),
        (4, 2 * local.CELL_BYTES, (), 2),
        (4, local.CELL_BYTES, (), 0),
        (4, 2**34, ("model.path=/elsewhere",), 0),  # not an embedded model
        (4, 2**34, ("threads=2",), 3),
    ],
)
def test_cells_of_embedded_models_run_one_per_core_with_one_thread_each(
    cores: int,
    free: int,
    options: tuple[str, ...],
    side_by_side: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched: list[tuple[str, list[int | None]]] = []

    def note(launcher: Here | Joblib, jobs: Sequence[job.Job]) -> Iterator[tuple[int, Path]]:
        width = launcher.jobs if isinstance(launcher, Joblib) else 0
        launched.append((str(width), [each.cell.config.threads for each in jobs]))
        yield from ()

    monkeypatch.setattr(local, "cores", lambda: cores)
    monkeypatch.setattr(local, "free_bytes", lambda: free)
    monkeypatch.setattr(Joblib, "launch", note)
    monkeypatch.setattr(Here, "launch", note)
    config = load("device=cpu", *options)
    assert list(Auto().launch([job.Job(Cell(config, "", {}, "", {}))] * 3)) == []
    threads = config.threads or (1 if side_by_side else None)
    assert launched == [(str(side_by_side), [threads] * 3)]


def no_launch(*_: object) -> None:
    raise AssertionError("no job is needed")


def test_a_sweep_of_two_workers_and_its_failure(
    elsewhere: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real cells of the miniature: one fails, the other is recorded, and reused without workers."""
    write_problems(elsewhere / "data")
    line = ["-m", "method=rtn", "data=folder", "data.source=data", "tracking=off", "threads=1"]
    capfd.readouterr()
    wrong = [*line, "launcher=joblib", "launcher.jobs=2", "calibration.samples=999,8"]
    assert main(wrong) == 2
    out, err = capfd.readouterr()
    (record,) = find_records("results/runs")
    assert out.startswith(f"wrote {record.path}\n")
    assert err.startswith("error: calibration.samples=999 is more than ")
    assert record.config["launcher"] == {"_target_": "qvlm.sweep.local.Joblib", "jobs": 2}

    monkeypatch.setattr(Joblib, "launch", no_launch)
    again = [*line, "calibration.samples=8"]
    for launcher in ("here", "joblib"):
        assert main([*again, f"launcher={launcher}"]) == 0
        assert capfd.readouterr().out.startswith(f"reused {record.path}\n")

    # One that another process computes takes no worker either: the sweep waits for it.
    aside = record.path.rename(elsewhere / "aside")
    held = Lock(record.path)
    held.__enter__()
    wait = Watch.wait

    def finish_and_wait(watch: Watch, records: Sequence[Path]) -> list[int]:
        assert not watch.is_free(records[0])
        aside.rename(record.path)
        held.__exit__(None, None, None)
        return wait(watch, records)

    monkeypatch.setattr(Watch, "wait", finish_and_wait)
    assert main([*again, "launcher=joblib"]) == 0
    waited, reused, *_ = capfd.readouterr().out.splitlines()
    assert waited.startswith(f"{record.name} is being computed by process {os.getpid()} on ")
    assert waited.endswith("going on with the others, and back to it at the end")
    assert reused == f"reused {record.path}"

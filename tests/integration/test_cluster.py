"""Cells as jobs: submitit's local executor, programs that stand in for Slurm's, and Ray."""

import multiprocessing
import os
import stat
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from qvlm.records.locks import Held
from qvlm.sweep import slurm
from qvlm.sweep.launch import build
from qvlm.sweep.ray import Ray
from qvlm.sweep.slurm import Slurm
from tests.helpers.light_cells import run, workers

submitit = pytest.importorskip("submitit")

ROOT = str(Path(__file__).resolve().parents[2])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ROOT)
    return tmp_path


def test_submitit_runs_all_and_returns_what_fails(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = run(Slurm(gpus=0, cluster="local"), "a", "fail", "die")
    assert outcomes[0] == Path("a")
    assert str(outcomes[1]) == "a layer is NaN"
    assert "mini_llava, rtn, W4A4 ended without a result (state" in str(outcomes[2])
    assert Path(str(outcomes[2]).rpartition("see ")[2]).is_file()
    workers("a")
    assert "submitted 3 jobs" in capsys.readouterr().out


def test_a_preempted_job_gives_its_lock_back_and_runs_again(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    submit = submitit.LocalExecutor._submit_command

    def remember(executor: Any, command: str) -> Any:
        started.append(submit(executor, command))
        return started[-1]

    def preempt() -> None:
        while not Path("stayed").exists():
            time.sleep(0.02)
        for job in started:
            os.kill(children(job._process.pid)[0], job_signal)

    def children(pid: int) -> list[int]:
        return [child.pid for child in psutil.Process(pid).children()]

    job_signal = submitit.local.local.LocalJobEnvironment._usr_sig()
    monkeypatch.setattr(submitit.LocalExecutor, "_submit_command", remember)
    thread = threading.Thread(target=preempt)
    thread.start()
    assert run(Slurm(gpus=0, cluster="local"), "stay") == [Path("stay")]
    thread.join()
    (log,) = (elsewhere / "results" / "slurm").glob("*.err")
    assert "this job is preempted" in log.read_text()
    assert not (elsewhere / "runs").exists()  # where the lock was


STANDINS = {
    "sbatch": """
        cp "$1" script
        last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$1")
        for task in $(seq 0 $last); do
            SLURM_JOB_ID=$((71 + task)) SLURM_ARRAY_JOB_ID=70 SLURM_ARRAY_TASK_ID=$task \\
                bash "$1" >/dev/null 2>&1 &
        done
        echo "Submitted batch job 70"
    """,
    "srun": """
        while [[ $1 == -* ]]; do
            if [[ $1 == --unbuffered ]]; then shift; else shift 2; fi
        done
        exec "$@"
    """,
    "sacct": """
        echo "JobID|State|NodeList"
        for task in 0 1 2; do echo "70_$task|RUNNING|node1"; done
    """,
}


def test_slurm_gets_one_array_with_what_was_asked_for(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs of Slurm's names that run the script they are given."""
    programs = elsewhere / "bin"
    programs.mkdir()
    for name, script in STANDINS.items():
        (programs / name).write_text(f"#!/bin/bash\n{script}")
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setitem(slurm.POLL, "slurm", 0.2)
    launcher = build(
        {
            "_target_": "qvlm.sweep.slurm.Slurm",
            **dict(partition="short", gpus=2, hours=1.5, memory_gib=24, cpus=3, jobs=2),
            "sbatch": {"account": "me"},
        }
    )
    assert isinstance(launcher, Slurm)
    outcomes = run(launcher, "a", "b", "fail")
    assert outcomes[:2] == [Path("a"), Path("b")]
    assert str(outcomes[2]) == "a layer is NaN"
    asked = Path("script").read_text().splitlines()
    for option in (
        *("partition=short", "gpus-per-node=2", "cpus-per-task=3", "mem=24GB", "time=90"),
        *("array=0-2%2", "account=me", "requeue", "nodes=1", "open-mode=append"),
    ):
        assert f"#SBATCH --{option}" in asked


def test_an_interrupt_leaves_the_jobs_of_a_cluster_alone_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [SimpleNamespace(job_id=f"70_{task}", done=lambda: False) for task in range(2)]

    def interrupted(*_: object, **__: object) -> Sequence[Any]:
        raise KeyboardInterrupt

    class Executor:
        def __init__(self, *_: object, **__: object) -> None:
            self.waiting = list(jobs)

        def update_parameters(self, **_: object) -> None:
            pass

        def batch(self) -> Any:
            return multiprocessing.Lock()  # something to enter

        def submit(self, _: object) -> Any:
            return self.waiting.pop(0)

    monkeypatch.setattr(submitit, "AutoExecutor", Executor)
    monkeypatch.setattr(submitit.helpers, "as_completed", interrupted)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: name)
    with pytest.raises(KeyboardInterrupt):
        run(Slurm(), "a", "b")
    assert capsys.readouterr().err == "2 Slurm jobs go on; `scancel 70` cancels them\n"


def test_ray_runs_all_and_returns_what_fails() -> None:
    pytest.importorskip("ray", exc_type=ImportError)
    outcomes = run(Ray(gpus=0), "a", "fail", "held", "b")
    assert [outcomes[0], outcomes[3]] == [Path("a"), Path("b")]
    assert str(outcomes[1]) == "a layer is NaN"
    assert isinstance(outcomes[2], Held)
    workers("a", "b")

"""Several processes share one results folder: each cell is computed once, whoever is killed.

The sweeps are real ones, of real cells of the miniature, each in a process of its own. They are
forked from a server that has imported everything.
"""

import multiprocessing
import os
import re
import signal
import sys
import time
from collections import Counter
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import datasets
import pytest

from qvlm.cli import main
from qvlm.data import miniature
from qvlm.data.scienceqa import COLUMNS
from qvlm.records.record import find_records

LONGEST = 300.0  # seconds that a sweep may take on a slow machine
CELLS = [("fp", "FP"), ("rtn", "W4A4"), ("rtn", "W6A6")]
QUESTIONS, BATCH = 48, 4


def run(folder: Path, name: str, arguments: list[str]) -> None:
    """What runs in a process of its own: `python run.py ...`, its output in `name`."""
    os.chdir(folder)
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    cell = ["data=folder", "data.source=data", "calibration.samples=8", "tracking=off", "threads=1"]
    sys.exit(main([*arguments, *cell, f"evaluation.batch_size={BATCH}"]))


class Shared:
    """A results folder and the processes that work in it.

    Attributes:
        folder: that they run in.
        runs: where the records are.
    """

    def __init__(self, context: ForkServerContext, folder: Path) -> None:
        self.context = context
        self.folder = folder
        self.runs = folder / "results" / "runs"

    def start(self, name: str, *arguments: str) -> BaseProcess:
        process = self.context.Process(target=run, args=(self.folder, name, list(arguments)))
        process.start()
        return process

    def owned(self, process: BaseProcess) -> list[str]:
        """The names of the records whose locks a process has."""
        locks = self.runs.glob(".*.lock")
        said = {lock.name: _read(lock) for lock in locks}
        return [name[1:-5] for name, text in said.items() if f'"pid": {process.pid},' in text]

    def stop_within(self, process: BaseProcess) -> str:
        """Stops a process in the middle of an evaluation; returns the name of its record."""
        assert process.pid is not None
        deadline = time.monotonic() + LONGEST
        while time.monotonic() < deadline:
            os.kill(process.pid, signal.SIGSTOP)
            for name in self.owned(process):
                if (
                    0
                    < len(list(self.runs.glob(f".{name}.*.answers/*.json")))
                    < QUESTIONS / BATCH / 2
                ):
                    return name
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.02)
        raise AssertionError(f"process {process.pid} evaluates nothing")

    def written(self, *names: str) -> Counter[str]:
        """How often the processes with this output said that they wrote which record."""
        output = "".join((self.folder / name).read_text() for name in names)
        return Counter(re.findall(r"^wrote results/runs/(.+)$", output, re.MULTILINE))


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""


@pytest.fixture
def shared(tmp_path: Path) -> Shared:
    (tmp_path / "data").mkdir()
    for split, count in (("test", QUESTIONS), ("train", 16)):
        problems = miniature.generate(split, count, seed=0)
        rows = datasets.Dataset.from_list(problems, features=COLUMNS)
        rows.to_parquet(tmp_path / "data" / f"{split}.parquet")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.integration.test_shared_results", "qvlm.cell.pipeline", "qvlm.records.tracking"]
    )
    return Shared(context, tmp_path)


def test_sweeps_share_their_cells_and_take_over_those_of_a_killed_one(shared: Shared) -> None:
    sweep = ["-m", "launcher=here", "method=fp,rtn", "bits=w4a4,w6a6"]
    killed = shared.start("killed", *sweep)
    others = {name: shared.start(name, *sweep) for name in ("second", "third")}
    orphan = shared.stop_within(killed)
    killed.kill()
    killed.join()
    for name, process in others.items():
        process.join(LONGEST)
        assert process.exitcode == 0, (shared.folder / name).read_text()

    records = find_records(shared.runs)
    assert [(record.run["method_name"], record.bits) for record in records] == CELLS
    assert all(len(record.predictions) == QUESTIONS for record in records)
    assert shared.written("killed", *others) == {record.name: 1 for record in records}
    assert list(shared.runs.glob(".*")) == []

    said = "".join((shared.folder / name).read_text() for name in others)
    taken = re.findall(r"^(.+): taking over from process (\d+) on ", said, re.MULTILINE)
    assert taken == [(orphan, str(killed.pid))]
    (record,) = (record for record in records if record.name == orphan)
    assert record.run["stages"]["evaluate"]["resumed_questions"] > 0
    for name in others:  # whoever met a cell of another says so, and has it in the end
        text = (shared.folder / name).read_text()
        assert len(re.findall(r"^(?:wrote|reused) ", text, re.MULTILINE)) == len(CELLS)


def test_a_single_cell_is_waited_for(shared: Shared) -> None:
    first = shared.start("first", "method=rtn", "bits=w4a4")
    name = shared.stop_within(first)
    second = shared.start("second", "method=rtn", "bits=w4a4")
    while "waiting" not in _read(shared.folder / "second") and second.is_alive():
        time.sleep(0.02)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGCONT)
    for process in (first, second):
        process.join(LONGEST)
        assert process.exitcode == 0
    assert shared.written("first", "second") == {name: 1}
    held, reused, *summary = (shared.folder / "second").read_text().splitlines()
    assert held.startswith(f"{name} is being computed by process {first.pid} on ")
    assert held.endswith("; waiting for it")
    assert reused == f"reused results/runs/{name}"
    assert any("Avg" in line for line in summary)

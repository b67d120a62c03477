"""A sweep is killed at random moments and started again: nothing is lost, doubled or different.

The sweeps are real ones, of real cells of the miniature, each in a process of its own. They are
forked from a server that has imported everything, so that a start costs no seconds and the kills
fall into the work. `QVLM_KILLS` sets how many there are.
"""

import multiprocessing
import os
import random
import re
import signal
import sys
import time
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import datasets
import pytest

from qvlm.cli import main
from qvlm.data import miniature
from qvlm.data.scienceqa import COLUMNS
from qvlm.records.record import find_records
from qvlm.tables import table2

KILLS = int(os.environ.get("QVLM_KILLS", 8))
CELLS = [("fp", "FP"), ("rtn", "W4A4")]
LONGEST = 300.0  # seconds that a sweep may take on a slow machine


def sweep(folder: Path, source: Path) -> None:
    """What runs in a process of its own: `python run.py -m ...`, its output in files."""
    # A shell starts what it runs in the background with interrupts ignored, this test perhaps too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    arguments = ["-m", "method=fp,rtn", "data=folder", f"data.source={source}"]
    arguments += ["calibration.samples=8", "evaluation.batch_size=4", "tracking=off", "threads=1"]
    sys.exit(main(arguments))


class Sweeps:
    """Starts sweeps over the same problems."""

    def __init__(self, context: ForkServerContext, source: Path) -> None:
        self.context = context
        self.source = source

    def start(self, folder: Path) -> BaseProcess:
        process = self.context.Process(target=sweep, args=(folder, self.source))
        process.start()
        return process

    def finish(self, folder: Path) -> None:
        process = self.start(folder)
        process.join(LONGEST)
        assert process.exitcode == 0, (folder / "err").read_text()


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> Sweeps:
    source = tmp_path_factory.mktemp("data")
    for split, count in (("test", 64), ("train", 16)):
        problems = miniature.generate(split, count, seed=0)
        rows = datasets.Dataset.from_list(problems, features=COLUMNS)
        rows.to_parquet(source / f"{split}.parquet")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.integration.test_kill", "qvlm.cell.pipeline", "qvlm.records.tracking"]
    )
    return Sweeps(context, source)


def tables(folder: Path) -> list[str]:
    """Table 2 as CSV and Markdown, without what cells cost, which is never twice the same."""
    runs, out = folder / "results" / "runs", folder / "tables"
    assert table2.main(["--runs", str(runs), "--out", str(out), "--command", "it"]) == 0
    page = (out / "table2.md").read_text()
    costs = re.compile(r"^\|[^\n]*search, s.*?\n\n", re.DOTALL | re.MULTILINE)
    assert len(costs.findall(page)) == 1
    return [(out / "table2.csv").read_text(), costs.sub("", page)]


def cells(folder: Path) -> list[tuple[str, str]]:
    """Method and bits of every record; fails if one is damaged."""
    records = find_records(folder / "results" / "runs")
    return [(record.run["method_name"], record.bits) for record in records]


@pytest.mark.endurance
def test_a_sweep_that_is_killed_ends_as_if_it_was_not(sweeps: Sweeps, tmp_path: Path) -> None:
    sweeps.finish(tmp_path / "warm")  # the server imports
    begun = time.monotonic()
    sweeps.finish(tmp_path / "whole")
    seconds = time.monotonic() - begun
    expected = tables(tmp_path / "whole")

    generator = random.Random(0)
    folders = [tmp_path / "killed-0"]
    kills = 0
    while kills < KILLS:
        process = sweeps.start(folders[-1])
        process.join(generator.uniform(0, seconds))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            assert set(cells(folders[-1])) <= set(CELLS)
        else:
            assert process.exitcode == 0, (folders[-1] / "err").read_text()
            folders.append(tmp_path / f"killed-{len(folders)}")
    for folder in folders:
        sweeps.finish(folder)
        assert cells(folder) == CELLS
        assert tables(folder) == expected


def test_an_interrupt_says_how_to_go_on(sweeps: Sweeps, tmp_path: Path) -> None:
    folder = tmp_path / "interrupted"
    process = sweeps.start(folder)
    runs = folder / "results" / "runs"
    deadline = time.monotonic() + LONGEST
    while not list(runs.glob(".*.answers")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(LONGEST)
    assert process.exitcode == 130
    said = (folder / "err").read_text()
    assert said.startswith("interrupted: ")
    assert said.count("\n") == 1
    sweeps.finish(folder)
    assert cells(folder) == CELLS
    assert list(runs.glob(".*")) == []

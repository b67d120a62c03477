"""Signals at random moments, a results folder that is removed, a full disk: nothing is lost.

Whatever happens to a sweep, a stream or a cell that saves its packed model, the same command ends
with the results of an undisturbed one. `test_kill` has SIGKILL over sweeps, and `test_locks` and
`test_shared_results` have several processes at once.
"""

import hashlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

import datasets
import pytest

from qvlm.cell import inputs
from qvlm.cli import main
from qvlm.config.schema import RunConfig
from qvlm.data import miniature
from qvlm.data.scienceqa import COLUMNS
from qvlm.records.record import find_records
from qvlm.tables import table2
from tests.helpers.records import make_record

LONGEST = 300.0  # seconds that a command may take on a slow machine
SCENES = {
    "sweep": ["-m", "launcher=here", "method=fp,rtn"],
    "stream": ["method=rtn", "stream=true", "save_packed=packed"],
    "save": ["method=rtn", "save_packed=packed"],
}
# Moments of each signal. SIGSTOP is followed by SIGCONT.
MOMENTS = {
    "sweep": {signal.SIGTERM: 2, signal.SIGINT: 2, signal.SIGSTOP: 2},
    "stream": {signal.SIGKILL: 2, signal.SIGTERM: 1, signal.SIGINT: 1, signal.SIGSTOP: 1},
    "save": {signal.SIGKILL: 2, signal.SIGTERM: 1, signal.SIGINT: 1, signal.SIGSTOP: 1},
}
TIMES = int(os.environ.get("QVLM_MOMENTS", 1))  # with 2, and QVLM_KILLS=20, there are over fifty
Results = Mapping[str, object]


def work(
    folder: Path, source: Path, arguments: list[str], limit: int | None, narrow: str | None
) -> None:
    """What runs in a process of its own: `python run.py`, its output in files.

    Args:
        limit: Largest file that the process can write, in bytes.
        narrow: Function of `qvlm.cell.inputs` from which on the process gets no more memory.
    """
    # A shell starts what it runs in the background with interrupts ignored, this test perhaps too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if narrow is not None:
        after = getattr(inputs, narrow)

        def narrowed(config: RunConfig) -> object:
            limit_memory()
            return after(config)

        setattr(inputs, narrow, narrowed)
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    cell = ["data=folder", f"data.source={source}", "calibration.samples=8", "tracking=off"]
    sys.exit(main([*arguments, *cell, "evaluation.batch_size=4", "threads=1"]))


def limit_memory() -> None:
    """Lets the process take hardly more memory than it has. Its threads have begun by then."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    taken = pages * resource.getpagesize() + 2**20
    resource.setrlimit(resource.RLIMIT_AS, (taken, resource.RLIM_INFINITY))


class Commands:
    """Starts one command after the other, over the same problems.

    Attributes:
        whole: Results of each scene when nothing disturbs it, and the seconds that it takes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "data"
        self.source.mkdir()
        for split, count in (("test", 32), ("train", 16)):
            problems = miniature.generate(split, count, seed=0)
            rows = datasets.Dataset.from_list(problems, features=COLUMNS)
            rows.to_parquet(self.source / f"{split}.parquet")
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            ["tests.integration.test_faults", "qvlm.cell.pipeline", "qvlm.records.tracking"]
        )
        self.whole: dict[str, tuple[Results, float]] = {}

    def undisturbed(self, scene: str) -> tuple[Results, float]:
        if scene not in self.whole:
            if not self.whole:
                self.finish(self.folder / "warm", "sweep")  # the server imports
            begun = time.monotonic()
            self.finish(self.folder / scene, scene)
            self.whole[scene] = results(self.folder / scene), time.monotonic() - begun
        return self.whole[scene]

    def start(
        self, folder: Path, scene: str, limit: int | None = None, narrow: str | None = None
    ) -> BaseProcess:
        process = self.context.Process(
            target=work, args=(folder, self.source, SCENES[scene], limit, narrow)
        )
        process.start()
        return process

    def finish(self, folder: Path, scene: str) -> None:
        process = self.start(folder, scene)
        process.join(LONGEST)
        assert process.exitcode == 0, (folder / "err").read_text()


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    return Commands(tmp_path_factory.mktemp("faults"))


def results(folder: Path) -> Results:
    """Every answer of every record, and the weights of the packed model."""
    records = find_records(folder / "results" / "runs")
    found: dict[str, object] = {
        record.name: record.predictions.to_csv(index=False) for record in records
    }
    for file in sorted((folder / "packed").glob("*.safetensors")):
        found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    assert not list((folder / "results" / "runs").glob(".*"))
    return found


def wait_for_begin(folder: Path, process: BaseProcess) -> None:
    while not (folder / "err").exists() and process.is_alive():
        time.sleep(0.005)


@pytest.mark.endurance
@pytest.mark.parametrize("scene", SCENES)
def test_a_signal_at_any_moment_costs_nothing(
    scene: str, commands: Commands, tmp_path: Path
) -> None:
    expected, seconds = commands.undisturbed(scene)
    generator = random.Random(scene)
    for kind, count in MOMENTS[scene].items():
        folder = tmp_path / kind.name
        for _ in range(TIMES * count):
            process = commands.start(folder, scene)
            wait_for_begin(folder, process)
            process.join(generator.uniform(0, seconds))
            if process.is_alive():
                assert process.pid is not None
                os.kill(process.pid, kind)
                if kind is signal.SIGSTOP:
                    time.sleep(generator.uniform(0, 0.3))
                    os.kill(process.pid, signal.SIGCONT)
                process.join(LONGEST)
            said = (folder / "err").read_text()
            assert "Traceback" not in said, said
            # Whoever is interrupted says how to go on; who was just finished has ended well.
            ends = {signal.SIGINT: 130, signal.SIGSTOP: 0}
            assert process.exitcode in (0, ends.get(kind, -kind)), said
            if process.exitcode == 0:
                assert results(folder) == expected
                folder = folder.with_name(f"{folder.name}-again")
        commands.finish(folder, scene)
        assert results(folder) == expected


def test_a_results_folder_that_is_removed_is_one_sentence_at_most(
    commands: Commands, tmp_path: Path
) -> None:
    expected, _ = commands.undisturbed("sweep")
    folder = tmp_path / "removed"
    process = commands.start(folder, "sweep")
    deadline = time.monotonic() + LONGEST
    while not list(folder.glob("results/runs/.*.answers/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    shutil.rmtree(folder / "results", ignore_errors=True)
    process.join(LONGEST)
    said = (folder / "err").read_text()
    assert "Traceback" not in said
    assert process.exitcode in (0, 1), said
    assert said.count("error: ") == process.exitcode
    commands.finish(folder, "sweep")
    assert results(folder) == expected


@pytest.mark.parametrize(("scene", "limit"), [("sweep", 2000), ("sweep", 6000), ("save", 50_000)])
def test_a_full_disk_is_one_sentence(
    scene: str, limit: int, commands: Commands, tmp_path: Path
) -> None:
    expected, _ = commands.undisturbed(scene)
    folder = tmp_path / "full"
    process = commands.start(folder, scene, limit)
    process.join(LONGEST)
    said = (folder / "err").read_text()
    assert process.exitcode in (1, 2), said
    assert "Traceback" not in said
    assert "File too large" in said
    assert all(line.startswith("error: ") for line in said.splitlines()), said
    if scene != "save":
        assert find_records(folder / "results" / "runs") == []
    commands.finish(folder, scene)
    assert results(folder) == expected


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux limits memory so")
@pytest.mark.parametrize("scene", ["stream", "save"])
@pytest.mark.parametrize("step", ["draw_calibration", "load_problems"])
def test_full_memory_costs_nothing(
    scene: str, step: str, commands: Commands, tmp_path: Path
) -> None:
    """Libraries may abort where they get no memory, so that not every end has a sentence."""
    expected, _ = commands.undisturbed(scene)
    folder = tmp_path / "narrow"
    process = commands.start(folder, scene, narrow=step)
    process.join(LONGEST)
    assert process.exitcode not in (0, None)
    assert find_records(folder / "results" / "runs") == []
    commands.finish(folder, scene)
    assert results(folder) == expected


def test_a_table_on_a_full_disk_is_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_record(tmp_path / "runs")
    arguments = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert table2.main(arguments) == 0
    before = [(tmp_path / "out" / f"table2.{kind}").read_text() for kind in ("csv", "md")]
    capfd.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        assert table2.main(arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capfd.readouterr().err
    assert said.startswith("error: --out: ")
    assert said.count("\n") == 1
    after = [(tmp_path / "out" / f"table2.{kind}").read_text() for kind in ("csv", "md")]
    assert after == before
    assert len(os.listdir(tmp_path / "out")) == 2

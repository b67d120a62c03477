"""One process at a time: locks are taken once, kept, given back, and taken over from the gone."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from qvlm.errors import RunError
from qvlm.records import locks
from qvlm.records.locks import Held, Lock, Owner, Watch, find_owner, lock_file

LONGEST = 60.0  # seconds that a process may take on a slow machine
ELSEWHERE = Owner("node7", 4211, "2026-01-01T00:00:00+00:00", namespace="another kernel")
HOLD = """
import sys, time
from pathlib import Path
from qvlm.records.locks import Lock
with Lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
TAKE_TURNS = """
import os, sys
from pathlib import Path
from qvlm.records.locks import Held, Lock
record, inside, turns = Path(sys.argv[1]), Path(sys.argv[2]), 0
while turns < 20:
    try:
        with Lock(record):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails if another is inside
            turns += 1
            inside.unlink()
    except Held:
        continue
print(turns)
"""


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return tmp_path / "results" / "runs" / "toy-rtn-w4a4-01234567"


@pytest.fixture(autouse=True)
def prompt(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(locks, "POLL", 0.02)
    # A shell's background job ignores interrupts, and so would whatever it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def place(record: Path, owner: Owner) -> Path:
    """A lock that somebody else has, as filelock and this package write it."""
    file = lock_file(record)
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ["filelock/2", f"pid={owner.pid}", f"host={owner.host}", "mode=lease"]
    lines += ["token=00", f"duration={locks.STALE}", f"qvlm={json.dumps(asdict(owner))}"]
    # Another owner's lock is another file, as it is when it is taken.
    other = file.with_name("other")
    other.write_text("\n".join(lines) + "\n")
    other.replace(file)
    return file


@pytest.fixture
def holder(record: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(record)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_one_has_it_and_leaves_nothing(record: Path, tmp_path: Path) -> None:
    with Lock(record) as lock:
        lock.confirm()
        with pytest.raises(Held) as refusal, Lock(record):
            pass
        assert refusal.value.owner == find_owner(record) == lock.owner
        assert str(refusal.value).startswith(f"{record.name} is being computed by process ")
        assert lock.owner.pid == os.getpid()
    assert find_owner(record) is None
    assert os.listdir(tmp_path) == []
    with Lock(record):
        (record.parent / "written").touch()
    assert os.listdir(record.parent) == ["written"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RunError, SystemExit])
def test_whatever_ends_the_block_ends_the_lock(error: type[BaseException], record: Path) -> None:
    with pytest.raises(error), Lock(record):
        raise error
    assert not lock_file(record).exists()


def test_it_is_held_across_processes_and_taken_over_from_the_dead_at_once(
    record: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Held, match=f"process {holder.pid} on "), Lock(record):
        pass
    holder.kill()
    while find_owner(record):  # it has ended, though nobody has waited for it yet
        time.sleep(0.01)
    with Lock(record) as lock:
        assert find_owner(record) == lock.owner
    said = capsys.readouterr().out
    assert said.startswith(f"{record.name}: taking over from process {holder.pid} on ")
    assert "does not run any more" in said


def test_an_interrupted_process_gives_it_back(record: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGINT)
    holder.wait(LONGEST)
    assert not lock_file(record).exists()


def test_processes_take_turns(record: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", TAKE_TURNS, str(record), str(tmp_path / "inside")]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in processes:
        out, err = process.communicate(timeout=LONGEST)
        assert (out, err) == ("20\n", "")
    assert list(tmp_path.rglob("*lock*")) == []


def test_of_many_that_take_over_one_wins(
    record: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "POLL", 1.0)
    monkeypatch.setattr(locks, "STALE", 0.2)
    monkeypatch.setattr(locks, "HEARTBEAT", 0.1)
    rounds = 10
    for _ in range(rounds):
        place(record, ELSEWHERE)
        begin, end = threading.Barrier(8), threading.Barrier(8)
        won: list[Owner] = []

        def take(begin: threading.Barrier, end: threading.Barrier, won: list[Owner]) -> None:
            watch = Watch()
            watch.is_free(record)
            time.sleep(0.2)
            begin.wait()
            watch.is_free(record)  # silent for long enough
            try:
                with Lock(record) as lock:
                    won.append(lock.owner)
                    end.wait()
                    lock.confirm()
            except Held:
                end.wait()

        threads = [threading.Thread(target=take, args=(begin, end, won)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert os.listdir(record.parent) == []
    assert capsys.readouterr().out.count("taking over") == rounds


def test_a_lock_that_was_taken_again_is_left_alone(
    record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "STALE", 0.0)
    watch = Watch()
    place(record, ELSEWHERE)
    look = locks._look
    monkeypatch.setattr(locks, "_look", lambda path: (look(path), place(record, ELSEWHERE))[0])
    assert not watch.is_free(record)  # what it saw is not there any more when it is removed
    monkeypatch.setattr(locks, "_look", look)
    assert find_owner(record) == ELSEWHERE
    assert watch.is_free(record)
    assert not lock_file(record).exists()


def test_silence_is_measured_by_who_waits(
    record: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "STALE", 0.3)
    file = place(record, ELSEWHERE)
    os.utime(file, (0, 0))  # by the clock of that machine it is 1970
    watch = Watch()
    begun = time.monotonic()
    beats = 0
    while beats < 30:
        assert not watch.is_free(record)
        os.utime(file, (beats, beats))
        beats += 1
        time.sleep(0.02)
    assert time.monotonic() - begun > 0.3
    assert watch.wait([record]) == [0]
    assert os.listdir(record.parent) == []
    assert "node7, since 2026-01-01T00:00:00+00:00, which gave no sign" in capsys.readouterr().out


def test_time_in_which_nobody_looked_is_no_silence(
    record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "STALE", 0.2)
    place(record, ELSEWHERE)
    watch = Watch()
    assert not watch.is_free(record)
    time.sleep(0.3)
    assert not watch.is_free(record)


def test_waiting_ends_with_the_first_that_is_free(record: Path) -> None:
    other = record.with_name("toy-rtn-w6a6-01234567")
    place(record, ELSEWHERE)
    place(other, ELSEWHERE)
    timer = threading.Timer(0.2, lambda: lock_file(other).unlink())
    timer.start()
    assert Watch().wait([record, other]) == [1]
    timer.join()


def test_a_heartbeat_is_seen(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "STALE", 0.5)
    monkeypatch.setattr(locks, "HEARTBEAT", 0.05)
    with Lock(record):
        watch = Watch()
        for _ in range(60):
            assert not watch.is_free(record)
            time.sleep(0.02)


def test_who_was_taken_over_is_interrupted_and_leaves_the_lock_alone(
    record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT", 0.05)
    with pytest.raises(Held, match="process 4211 on node7"), Lock(record):
        place(record, ELSEWHERE)
        time.sleep(LONGEST)
    assert find_owner(record) == ELSEWHERE


def test_who_lost_the_folder_is_interrupted(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT", 0.05)
    with pytest.raises(Held, match="by another process"), Lock(record):
        shutil.rmtree(record.parent)
        time.sleep(LONGEST)


def test_who_was_taken_over_does_not_write(record: Path) -> None:
    with Lock(record) as lock:
        place(record, ELSEWHERE)
        with pytest.raises(Held, match="node7"):
            lock.confirm()


def test_a_requeued_slurm_job_succeeds_itself(
    record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = replace(ELSEWHERE, job="99")
    place(record, earlier)
    for job, restarts in (("98", "1"), ("99", "0")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        with pytest.raises(Held, match="Slurm job 99"), Lock(record):
            pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with Lock(record) as lock:
        assert (lock.owner.job, lock.owner.restarts) == ("99", 1)


@pytest.mark.parametrize(
    "content", ["", "{", "filelock/2\npid=1", "\0" * 99, "qvlm=[]\n", "qvlm={}"]
)
def test_a_lock_without_a_readable_owner_is_held_until_it_is_silent(
    record: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    place(record, ELSEWHERE).write_text(content)
    with pytest.raises(Held, match="process [01] on an unknown machine"), Lock(record):
        pass
    watch = Watch()
    assert not watch.is_free(record)
    monkeypatch.setattr(locks, "STALE", 0.1)
    assert watch.wait([record]) == [0]
    monkeypatch.setattr(locks, "STALE", 180.0)
    with Lock(record):
        pass


def test_a_folder_in_its_place_is_one_sentence(record: Path) -> None:
    lock_file(record).mkdir(parents=True)
    for call in (
        Lock(record).__enter__,
        lambda: find_owner(record),
        lambda: Watch().wait([record]),
    ):
        with pytest.raises(RunError, match=r"^lock .* is not a file; remove it$"):
            call()
    assert lock_file(record).is_dir()


def test_a_full_disk_leaves_no_lock(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(locks.json, "dumps", full)
    with pytest.raises(RunError, match="No space left on device"), Lock(record):
        pass
    assert not record.parent.exists()


def test_a_refusal_travels(record: Path) -> None:
    held = Held(record, ELSEWHERE)
    copy = pickle.loads(pickle.dumps(held))
    assert (copy.record, copy.owner, str(copy)) == (record, ELSEWHERE, str(held))

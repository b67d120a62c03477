"""One process at a time per cell: a lock beside the record, in a folder that machines may share.

    results/runs/.<record>.lock/<token>      who computes the cell: machine, process, job, since

A lock is a folder with one file in it, named by a token that no other lock ever has. Three steps,
each of which a file system does as a whole or not at all:

- To take it, the folder is made under another name and renamed. A rename onto a folder that holds a
  file fails, so of two that try, one has it.
- To keep it, a thread sets the time of the file every `HEARTBEAT` seconds.
- To end it, the file is removed: by its owner, or by whoever found that the owner is gone. Since it
  is removed by its token, one that comes late cannot remove what another has taken meanwhile; it
  meets that one's folder when it renames its own.

An owner is gone if its process does not exist any more, which is seen at once by processes of the
same machine (and of the same container) and by a Slurm job that was requeued about its own earlier
run. Otherwise its heartbeat must have stood still for `STALE` seconds that the observer spent
looking; the clocks of two machines are never compared.

What is not promised. An owner that was stopped, or cut off from the disk, for longer than `STALE`
and then goes on is a second one until its next heartbeat, where it notices, is interrupted and
raises `Held`. Until then it may write the answers of one more batch; that is harmless, because
answers and records are written whole and are the same whoever computes them. The disk must rename
folders atomically and show the time of a file within `STALE` seconds, as local disks and NFS do,
and object stores do not. Only local disks were tried.
"""

import errno
import json
import os
import shutil
import signal
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import psutil
from tqdm import tqdm

from qvlm.errors import RunError

LOCK = ".lock"
PARTIAL = ".partial"  # what is being made; `qvlm.records` removes what was given up
HEARTBEAT = 15.0  # seconds between two signs of life
STALE = 180.0  # seconds without one; NFS may show the time of a file a minute late
POLL = 1.0  # seconds between two looks at the same lock
TRIES = 10  # to take a lock that is changing hands
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)  # the last: its parent was just removed


@dataclass(frozen=True)
class Owner:
    """Who computes a cell.

    Attributes:
        host: the machine's name.
        pid: the process.
        started: when it took the lock, in UTC, by its own clock.
        processes: the table of processes that `pid` is in; "" where it has no name.
        job: its Slurm job, or "".
        restarts: how often that job was requeued.
    """

    host: str
    pid: int
    started: str
    processes: str = ""
    job: str = ""
    restarts: int = 0

    @classmethod
    def me(cls) -> "Owner":
        """This process, now."""
        return cls(
            socket.gethostname(),
            os.getpid(),
            datetime.now(UTC).isoformat(timespec="seconds"),
            _process_table(),
            os.environ.get("SLURM_JOB_ID", ""),
            int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        )

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.started}"

    def is_gone(self) -> bool:
        """Whether it certainly does not run any more; False if that cannot be told from here."""
        me = Owner.me()
        if self.job and self.job == me.job and self.restarts < me.restarts:
            return True
        return bool(self.processes) and self.processes == me.processes and not _exists(self.pid)


class Held(RunError):
    """Another process computes the cell.

    Attributes:
        record: the folder that its record will have.
        owner: that process; None if the lock was changing hands.
    """

    def __init__(self, record: Path, owner: Owner | None) -> None:
        super().__init__(record, owner)  # what pickle makes it from again
        self.record = record
        self.owner = owner

    def __str__(self) -> str:
        return f"{self.record.name} is being computed by {self.owner or 'another process'}"


@dataclass(frozen=True)
class _Sign:
    """What can be seen of a lock: its token, its owner and the time of its file in ns."""

    token: str
    owner: Owner
    beat: int


class Lock:
    """Holds the lock of a record while its block runs.

    Args:
        record: the folder of the record; it need not exist.
        heartbeat: seconds between two signs of life.

    Raises:
        Held: on entering, if another process has it; in or after the block, if another process
            took it over because this one gave no sign of life.
        RunError: if the disk does not take it.
    """

    def __init__(self, record: Path, heartbeat: float = HEARTBEAT) -> None:
        self.record = record
        self.owner = Owner.me()
        self._folder = lock_folder(record)
        self._token = uuid.uuid4().hex
        self._file = self._folder / self._token
        self._heartbeat = heartbeat
        self._made: list[Path] = []
        self._lost = False
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def __enter__(self) -> "Lock":
        parents = (self.record.parent, self.record.parent.parent)
        self._made = [folder for folder in parents if not folder.exists()]
        self._take()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._released.set()
        self._thread.join()
        _end(self._folder, self._token)
        with suppress(OSError):  # something was written there
            for folder in self._made:
                folder.rmdir()
        if self._lost and isinstance(error, KeyboardInterrupt):
            raise self._taken_over() from error

    def confirm(self) -> None:
        """Makes sure that the lock is still this process's.

        Raises:
            Held: if it is not.
        """
        if not self._file.exists():
            raise self._taken_over()

    def _take(self) -> None:
        owner = None
        for _ in range(TRIES):
            sign = _look(self._folder)
            owner = sign.owner if sign else None
            if sign and sign.owner.is_gone():
                _take_over(self._folder, sign, "which does not run any more")
            elif sign:
                break
            if self._rename_into_place():
                return
            time.sleep(0.05)
        raise Held(self.record, owner)

    def _rename_into_place(self) -> bool:
        made = self._folder.with_name(f"{self._folder.name}.{self._token}{PARTIAL}")
        try:
            made.mkdir(parents=True)
            (made / self._token).write_text(json.dumps(asdict(self.owner)))
            with suppress(OSError):  # empty, if who ended it last was killed
                self._folder.rmdir()
            made.rename(self._folder)
        except OSError as error:
            shutil.rmtree(made, ignore_errors=True)
            if error.errno not in _OCCUPIED:
                raise RunError(f"{self._folder} cannot be written: {error}") from error
            return self._file.exists()  # over NFS what was done may be reported as failed
        return True

    def _live(self) -> None:
        while not self._released.wait(self._heartbeat):
            try:
                os.utime(self._file)
            except FileNotFoundError:
                self._lost = True
                main = threading.main_thread().ident
                assert main is not None
                signal.pthread_kill(main, signal.SIGINT)  # unlike a flag, it ends a sleep
                return
            except OSError:
                continue  # the disk is away; if that lasts, another process takes over

    def _taken_over(self) -> Held:
        sign = _look(self._folder)
        return Held(self.record, sign.owner if sign else None)


class Watch:
    """Looks at locks again and again, and ends those whose owners are gone.

    Args:
        stale: seconds without a sign of life after which an owner is gone.
    """

    def __init__(self, stale: float = STALE) -> None:
        self._stale = stale
        self._seen: dict[Path, tuple[_Sign, float, float]] = {}  # and when, and how long silent

    def wait(self, records: Sequence[Path]) -> list[int]:
        """Waits until locks of `records` are free, and returns the positions of those that are."""
        while True:
            if free := [index for index, record in enumerate(records) if self.is_free(record)]:
                return free
            time.sleep(POLL)

    def is_free(self, record: Path) -> bool:
        """Whether nobody computes the cell, as far as could be seen up to now."""
        folder = lock_folder(record)
        sign = _look(folder)
        if sign is None or sign.owner.is_gone():
            return True
        now = time.monotonic()
        before, at, silent = self._seen.get(folder, (None, now, 0.0))
        # Time in which this process did not look, being stopped itself, says nothing.
        silent = silent + min(now - at, 2 * POLL) if sign == before else 0.0
        self._seen[folder] = sign, now, silent
        if silent < self._stale:
            return False
        _take_over(folder, sign, f"which gave no sign of life for {silent:.0f} seconds")
        return True


def lock_folder(record: Path) -> Path:
    """Where the lock of a record is: beside it, hidden."""
    return record.with_name(f".{record.name}{LOCK}")


def find_owner(record: Path) -> Owner | None:
    """Who computes a cell, unless it is certainly gone."""
    sign = _look(lock_folder(record))
    return None if sign is None or sign.owner.is_gone() else sign.owner


def _look(folder: Path) -> _Sign | None:
    try:
        tokens = [name for name in os.listdir(folder) if name[0] != "."]  # .nfs...: removed
        if not tokens:
            return None
        with open(folder / tokens[0]) as file:  # over NFS only opening asks for the present time
            content, beat = file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
    try:
        return _Sign(tokens[0], Owner(**json.loads(content)), beat)
    except (ValueError, TypeError):  # of another version, or lost in a power cut
        return _Sign(tokens[0], Owner("an unknown machine", 0, "an unknown time"), beat)


def _take_over(folder: Path, sign: _Sign, reason: str) -> None:
    if _end(folder, sign.token):
        name = folder.name.removeprefix(".").removesuffix(LOCK)
        tqdm.write(f"{name}: taking over from {sign.owner}, {reason}")


def _end(folder: Path, token: str) -> bool:
    """Ends the lock with this token; False if somebody else did."""
    try:
        (folder / token).unlink()
    except FileNotFoundError:
        return False
    finally:
        with suppress(OSError):  # not there, or taken by the next one
            folder.rmdir()
    return True


def _process_table() -> str:
    """Names what process ids are unique in: this boot of the kernel, this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _exists(pid: int) -> bool:
    """Whether a process runs; a dead one that nobody has waited for does not."""
    try:
        os.kill(pid, 0)
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except PermissionError:  # somebody else's; psutil may not even see it
        return True
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False

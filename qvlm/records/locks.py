"""One process at a time per cell: a lock beside the record, in a folder that machines may share.

    results/runs/.<record>.lock

A lock is a `SoftFileLease` of filelock, which makes the file exclusively, sets its time every
`HEARTBEAT` seconds, tells this process if the file is no longer its own, and proves by process id
and start time that an owner on the same machine (and in the same container) has ended. The file
also says, in a line that filelock ignores, which job owns the lock and since when.

This module adds what filelock does not promise:

- Take-over on every file system. filelock exchanges two files atomically, which NFS cannot do, and
  never takes over there. `Watch` removes the lock of an owner that has ended, while it holds a
  second lock that excludes other watchers.
- Locks without a readable owner, as a power cut leaves them: filelock waits for them forever.
- Processes that ended and that nobody has waited for (zombies), which filelock takes for running,
  and the earlier run of a requeued Slurm job, on whatever machine it was. Both have ended for sure.
- Time in which the observer itself was stopped is not silence of the owner.

An owner has ended if that can be proved, or if its heartbeat stood still for `STALE` seconds that
the observer spent looking; the clocks of two machines are never compared.

Not promised: an owner that was stopped or cut off from the disk for longer than `STALE` and then
goes on is a second owner until its next two heartbeats, which interrupt it and raise `Held`. Until
then it may write the answers of a few more batches. That is harmless, because answers and records
are written whole and are the same whoever computes them. The disk must create files exclusively and
show the time of a file within `STALE` seconds, as local disks and NFS do and object stores do not.
Only local disks were tried.
"""

import json
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import psutil
from filelock import FileLock, LeaseSettingsMismatch, SoftFileLease, Timeout
from tqdm import tqdm

from qvlm.errors import RunError
from qvlm.records.files import reason

LOCK = ".lock"
HEARTBEAT = 15.0  # seconds between two signs of life
STALE = 180.0  # seconds without one; NFS may show the time of a file a minute late
POLL = 1.0  # seconds between two looks at the same lock
TRIES = 10  # to make a lock in a folder that other processes remove
_OWNER = "qvlm"  # key of the line that says who owns a lock


@dataclass(frozen=True)
class Owner:
    """The process that computes a cell.

    Attributes:
        host: Name of its machine.
        pid: Process id.
        started: Time at which it took the lock, in UTC by its own clock, as ISO 8601.
        namespace: Boot of the kernel and PID namespace in which `pid` is unique; "" if unknown.
        job: Slurm job id, or "".
        restarts: Number of times that the Slurm job was requeued.
    """

    host: str
    pid: int
    started: str
    namespace: str = ""
    job: str = ""
    restarts: int = 0

    @classmethod
    def me(cls) -> "Owner":
        """Returns this process as an owner that starts now."""
        return cls(
            socket.gethostname(),
            os.getpid(),
            datetime.now(UTC).isoformat(timespec="seconds"),
            _namespace(),
            os.environ.get("SLURM_JOB_ID", ""),
            int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        )

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.started}"

    def has_ended(self) -> bool:
        """Whether this process has certainly ended; False if that cannot be known from here."""
        me = Owner.me()
        if self.job and self.job == me.job and self.restarts < me.restarts:
            return True
        if not self.namespace or self.namespace != me.namespace:
            return False
        try:
            return bool(psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


class Held(RunError):
    """Another process computes the cell.

    Attributes:
        record: Folder that the record of the cell will have.
        owner: Process that computes it; None if the lock was just changing hands.
    """

    def __init__(self, record: Path, owner: Owner | None) -> None:
        super().__init__(record, owner)  # the arguments that unpickling passes
        self.record = record
        self.owner = owner

    def __str__(self) -> str:
        return f"{self.record.name} is being computed by {self.owner or 'another process'}"


@dataclass(frozen=True)
class _Sight:
    """A lock at one moment: two equal sights show the same owner without a heartbeat in between."""

    owner: Owner
    inode: int
    beat: int


class Lock:
    """Holds the lock of a record while its block runs.

    Args:
        record: Folder of the record, which need not exist.

    Attributes:
        owner: This process.

    Raises:
        Held: On entering, if another process has the lock; in or after the block, if another
            process took it over because this one gave no sign of life.
        RunError: If the lock cannot be written.
    """

    def __init__(self, record: Path) -> None:
        self.record = record
        self.owner = Owner.me()
        self._lease = SoftFileLease(
            lock_file(record),
            lease_duration=STALE,
            heartbeat_interval=HEARTBEAT,
            on_compromise=self._interrupt,
        )
        self._made: list[Path] = []
        self._lost = False

    def __enter__(self) -> "Lock":
        path = lock_file(self.record)
        self._made = [folder for folder in (path.parent, path.parent.parent) if not folder.exists()]
        try:
            for _ in range(TRIES - 1):
                with suppress(FileNotFoundError, FileExistsError):  # the folder was just removed
                    self._take(path)
                    return self
                self._lease.release()
            self._take(path)
        except (Timeout, LeaseSettingsMismatch) as error:
            raise self._held() from error
        except BaseException as error:
            self._release()
            if isinstance(error, OSError):
                raise RunError(f"lock {path} cannot be written ({reason(error)})") from error
            raise
        return self

    def _take(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        sight = _look(path)
        if sight is not None and sight.owner.has_ended():
            _take_over(path, sight, "which does not run any more")
        self._lease.acquire(timeout=0)
        with path.open("a") as file:
            file.write(f"{_OWNER}={json.dumps(asdict(self.owner))}\n")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()
        if self._lost and isinstance(error, KeyboardInterrupt):
            raise self._held() from error

    def _release(self) -> None:
        self._lease.release()
        with suppress(OSError):  # not empty
            for folder in self._made:
                folder.rmdir()

    def confirm(self) -> None:
        """Makes sure that this process still has the lock.

        Raises:
            Held: If it does not.
        """
        published = self._lease.owner
        if published is None or published.token != self._lease.token:
            raise self._held()

    def _held(self) -> Held:
        sight = _look(lock_file(self.record))
        return Held(self.record, sight.owner if sight else None)

    def _interrupt(self, _: object) -> None:
        self._lost = True
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)  # unlike a flag, it ends a sleep


class Watch:
    """Looks at locks again and again, and removes those whose owners have ended."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[_Sight, float, float]] = {}  # sight, when, silent seconds

    def wait(self, records: Sequence[Path]) -> list[int]:
        """Waits until locks of `records` are free, and returns the positions of those that are."""
        while True:
            if free := [index for index, record in enumerate(records) if self.is_free(record)]:
                return free
            time.sleep(POLL)

    def is_free(self, record: Path) -> bool:
        """Returns whether no process computes the cell, as far as was seen up to now."""
        path = lock_file(record)
        sight = _look(path)
        if sight is None or sight.owner.has_ended():
            return True
        now = time.monotonic()
        before, at, silent = self._seen.get(path, (None, now, 0.0))
        # Time in which this process did not look, because it was stopped itself, does not count.
        silent = silent + min(now - at, 2 * POLL) if sight == before else 0.0
        self._seen[path] = sight, now, silent
        if silent < STALE:
            return False
        return _take_over(path, sight, f"which gave no sign of life for {silent:.0f} seconds")


def lock_file(record: Path) -> Path:
    """Returns the lock of a record: a hidden file beside it."""
    return record.with_name(f".{record.name}{LOCK}")


def find_owner(record: Path) -> Owner | None:
    """Returns the process that computes a cell, unless it has certainly ended."""
    sight = _look(lock_file(record))
    return None if sight is None or sight.owner.has_ended() else sight.owner


def _look(path: Path) -> _Sight | None:
    """Returns what can be seen of a lock; None if there is none.

    Raises:
        RunError: If something else is in its place.
    """
    try:
        # Asked once, because the lock may go at any moment. Opening a pipe would wait forever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise RunError(f"lock {path} is not a file; remove it")
        with path.open(errors="replace") as file:  # on NFS only opening asks for the present time
            lines, status = file.read(4096).splitlines(), os.fstat(file.fileno())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RunError(f"lock {path} cannot be read ({reason(error)}); remove it") from error
    fields = dict(line.partition("=")[::2] for line in lines)
    try:
        owner = Owner(**json.loads(fields[_OWNER]))
    except (KeyError, ValueError, TypeError):  # just being written, or damaged by a power cut
        pid = fields.get("pid", "")
        host = fields.get("host", "an unknown machine")
        owner = Owner(host, int(pid) if pid.isdecimal() else 0, "an unknown time")
    return _Sight(owner, status.st_ino, status.st_mtime_ns)


def _take_over(path: Path, sight: _Sight, why: str) -> bool:
    """Removes the lock that was seen; returns False if it has changed since.

    Only one process at a time removes locks, so none removes what another one has taken meanwhile.
    """
    guard = path.with_name(f"{path.name}.watch")
    try:
        with FileLock(guard, timeout=POLL):
            if unchanged := _look(path) == sight:
                path.unlink(missing_ok=True)
            guard.unlink(missing_ok=True)
    except Timeout:
        return False
    except OSError as error:
        raise RunError(f"lock {guard} cannot be written ({reason(error)}); remove it") from error
    if not unchanged:
        return False
    name = path.name.removeprefix(".").removesuffix(LOCK)
    tqdm.write(f"{name}: taking over from {sight.owner}, {why}")
    return True


def _namespace() -> str:
    """Returns what process ids are unique in: this boot of the kernel, this PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""

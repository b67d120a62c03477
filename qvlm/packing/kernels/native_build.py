"""Compiles `native.c` for the instruction set of this machine, and keeps the library.

There is a library for each instruction set of `INSTRUCTION_SETS`, and the machine's first one is
loaded. All of them give the same bits where sums are exact. The machine's C compiler compiles a
library when it is first needed, which takes about ten seconds, and it is kept in a cache folder
that only the user may write. Its name holds the hash of its content, and it is loaded only if it is
the user's own file with that content, because loading runs it. Without such a folder it is compiled
anew by each process.

The environment variable `QVLM_WITHOUT` names instruction sets to do without, separated by commas,
so that a developer can run what another CPU runs: `QVLM_WITHOUT=avx512,avxvnni,avx512vl` leaves
AVX2. With "native" there is no library at all, as on a machine without a compiler. It must be set
before the first packed layer is made. `make test-narrow` sets it.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from qvlm.errors import UserError
from qvlm.records.files import sync, temporary_name

FOLDER = Path(__file__).parent
WITHOUT = "QVLM_WITHOUT"
# Options of the compiler for each instruction set. Those that are preferred come first.
INSTRUCTION_SETS = {
    "avx512": [
        "-mfma",
        *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni", "vbmi", "bf16")),
    ],
    "avxvnni": ["-mavx2", "-mfma", "-mavxvnni"],
    "avx512vl": ["-mavx2", "-mfma", "-mavx512f", "-mavx512vl", "-mavx512vnni"],
    "avx2": ["-mavx2", "-mfma"],
    "i8mm": ["-march=armv8.2-a+dotprod+i8mm"],
    "dotprod": ["-march=armv8.2-a+dotprod"],
}
NATIVE = "native"
# Every operation is rounded by itself, so that all instruction sets give the same bits.
FLAGS = ["-O3", "-fPIC", "-ffp-contract=off"]


def supported() -> list[str]:
    """Returns the instruction sets that this machine can run, the preferred one first.

    Raises:
        OSError: If there is no compiler, the compiler fails, or its output does not load.
    """
    cpu = _load("native_cpu.c", [])
    return [name for name in INSTRUCTION_SETS if cpu.supports(name.encode())]


@cache
def version() -> str:
    """Returns a hash of the C sources."""
    files = sorted([*FOLDER.glob("*.c"), *FOLDER.glob("*.h")])
    return _digest(b"".join(file.read_bytes() for file in files))[:16]


def left_out() -> list[str]:
    """Returns what `QVLM_WITHOUT` names.

    Raises:
        UserError: If it names anything but instruction sets or "native".
    """
    names = [name for name in os.environ.get(WITHOUT, "").split(",") if name]
    for name in names:
        if name not in (NATIVE, *INSTRUCTION_SETS):
            choices = ", ".join((NATIVE, *INSTRUCTION_SETS))
            raise UserError(
                f"{WITHOUT}={name!r} is not an instruction set to do without. Choose one of: "
                f"{choices}."
            )
    return names


@cache
def library(instruction_set: str) -> ctypes.CDLL:
    """Loads the library of an instruction set, which this machine supports.

    It is not linked to an OpenMP library but uses the one that PyTorch has loaded. So
    `torch.set_num_threads` holds for it, and no second pool of threads competes.

    Raises:
        OSError: If there is no compiler, the compiler fails, or its output does not load.
    """
    # Apple's compiler takes the option for OpenMP only in this way.
    openmp = ["-Xpreprocessor"] if sys.platform == "darwin" else []
    return _load("native.c", [*INSTRUCTION_SETS[instruction_set], *openmp, "-fopenmp"])


def cache_folder() -> Path | None:
    """Returns the folder that keeps libraries, or None if nothing there can be trusted.

    It is a folder itself, not a link to one, belongs to the user, and nobody else may enter it.
    """
    home = os.environ.get("HOME") != "" and os.path.expanduser("~/.cache")
    caches = os.environ.get("XDG_CACHE_HOME") or home or ""
    if not os.path.isabs(caches) or not hasattr(os, "geteuid"):
        return None
    folder = Path(caches, "qvlm")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return None
        if stat.S_IMODE(status.st_mode) != 0o700:
            folder.chmod(0o700)  # what others put there before is not the user's, or not intact
        with tempfile.TemporaryFile(dir=folder):  # a full or read-only disk refuses
            pass
    except OSError:
        return None
    return folder


def is_own(file: Path) -> bool:
    """Whether a file is the user's own, and nobody else could write it.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        return False
    return not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def compiled(folder: Path, source: str, flags: list[str]) -> Path:
    """Returns the path of a library, and compiles it unless this source was compiled before.

    Args:
        folder: Folder that only the user may write.
        source: Name of a C file of this package.
        flags: Options of the compiler besides `FLAGS`.

    Raises:
        OSError: If there is no compiler, or it fails, or the folder cannot be written.
    """
    compiler = _compiler()
    headers = sorted(FOLDER.glob("*.h"))
    content = b"".join(file.read_bytes() for file in (FOLDER / source, *headers))
    identity = hashlib.sha256(content + " ".join([*compiler, *FLAGS, *flags]).encode())
    stem = f"{Path(source).stem}-{identity.hexdigest()[:16]}"
    for found in sorted(folder.glob(f"{stem}-*.so")):
        if is_intact(found):
            return found
        found.unlink(missing_ok=True)
    content = _compile(compiler, FOLDER / source, flags)
    target = folder / f"{stem}-{_digest(content)}.so"
    write_private(target, content)
    return target


def write_private(file: Path, content: bytes) -> None:
    """Writes a file that `is_own` accepts from the moment at which it has its name.

    A mode that is set afterwards would let another process delete or ignore it in between.

    Raises:
        OSError: If it cannot be written. Then no other file is left.
    """
    written = temporary_name(file)
    try:
        written.touch(0o600)
        written.write_bytes(content)
        sync(written)
        written.replace(file)
    finally:
        written.unlink(missing_ok=True)


def is_intact(file: Path) -> bool:
    """Whether a library is a file of the user that nobody else could write, with its own content.

    Loading a truncated library kills the process, and loading a planted one runs it.
    """
    try:
        if not is_own(file):
            return False
        content = file.read_bytes()
    except FileNotFoundError:  # another process has just replaced it
        return False
    return file.stem.rpartition("-")[2] == _digest(content)


def _load(source: str, flags: list[str]) -> ctypes.CDLL:
    """Loads the library of a C file of this package, and compiles it if need be.

    Where the cache folder is full or nothing may be run from it, a temporary folder serves.
    """
    if (folder := cache_folder()) is not None:
        with suppress(OSError):
            return ctypes.CDLL(str(compiled(folder, source, flags)))
    with tempfile.TemporaryDirectory(prefix="qvlm-") as own:
        # A library stays loaded when its file is deleted.
        return ctypes.CDLL(str(compiled(Path(own), source, flags)))


def _compiler() -> list[str]:
    """The command of the C compiler: a program, and what `CC` gives it, as in "ccache gcc".

    Raises:
        OSError: If there is none.
    """
    named = os.environ.get("CC", "")
    try:
        command = shlex.split(named)
    except ValueError as error:
        raise OSError(f"CC={named!r} is no command: {error}") from error
    found = command or [path for name in ("cc", "gcc") if (path := shutil.which(name))][:1]
    if not found:
        raise OSError("there is no C compiler")
    return found


def _compile(compiler: list[str], source: Path, flags: list[str]) -> bytes:
    """Compiles a C file and returns the content of the library.

    Raises:
        OSError: If the compiler fails.
    """
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    with tempfile.TemporaryDirectory(prefix="qvlm-") as folder:
        made, library = Path(folder, "native.o"), Path(folder, "native.so")
        for command in (
            [*compiler, *FLAGS, *flags, "-c", str(source), "-o", str(made)],
            [*compiler, "-shared", *undefined, str(made), "-o", str(library)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                message = (done.stderr.strip().splitlines() or ["it gave no reason"])[0]
                raise OSError(f"the C compiler {shlex.join(compiler)} fails: {message}")
        return library.read_bytes()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]

"""The one way in which this project writes files: whole or not at all, and on the disk.

A file is written under a temporary name beside its place, flushed, synced and renamed, and then the
folder is synced. After a kill or a power cut the file is the old one, the new one or absent, never
half of one. A temporary name is hidden and ends in `PARTIAL`, so that nobody takes it for a result
and leftovers of killed processes can be found.
"""

import errno
import glob
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from qvlm.errors import RunError, UserError

PARTIAL = ".partial"  # suffix of files and folders that are being written


def write_file(path: Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Writes one file, as `write_files`."""
    write_files({path: content})


def write_files(contents: Mapping[Path, bytes | str | Callable[[Path], object]]) -> None:
    """Writes files and replaces those that exist: all files are written before one is renamed.

    Folders are made where they are missing. Files get the mode that the user's umask gives to new
    files.

    Args:
        contents: Content by path: bytes, text (written as UTF-8 with "\\n" line ends), or a
            function that writes the file at the temporary path that it is given.

    Raises:
        OSError: If a file cannot be written. Then no temporary file is left, and the files that
            were there before are unchanged, unless the disk failed between two renames.
    """
    temporary: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary[path] = written = temporary_name(path)
            if callable(content):
                _call(content, written)
            else:
                written.write_bytes(content.encode() if isinstance(content, str) else content)
            sync(written)
        for path, written in temporary.items():
            written.replace(path)
        for folder in {path.parent for path in contents}:
            sync(folder)
    finally:
        for written in temporary.values():
            with suppress(OSError):  # renamed, or never made
                written.unlink()


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Writes a folder and replaces one of the same name.

    Args:
        path: Folder; its parents are made where they are missing.
        fill: Function that writes files into the empty folder that it is given.

    Raises:
        OSError: If the folder cannot be written. Then the one before is unchanged.
    """
    written, replaced = temporary_name(path), temporary_name(path)
    try:
        written.mkdir(parents=True)
        fill(written)
        for file in written.iterdir():
            sync(file)
        sync(written)
        if path.exists():  # a rename does not replace a folder that holds files
            path.rename(replaced)
        written.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(written, ignore_errors=True)
        if not path.exists():  # interrupted between the two renames
            with suppress(FileNotFoundError):
                os.rename(replaced, path)
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def explained(what: str, kind: type[UserError | RunError], remedy: str = "") -> Iterator[None]:
    """Turns an `OSError` of the block into one sentence.

    Args:
        what: Subject of the sentence, such as "results_dir: /data/results".
        kind: Exception that is raised instead.
        remedy: What the user can do about it, as the second part of the sentence.
    """
    try:
        yield
    except OSError as error:
        sentence = f"{what} cannot be written ({reason(error)})"
        raise kind(f"{sentence}; {remedy}" if remedy else sentence) from error


def reason(error: OSError) -> str:
    """Returns why the operating system refused, such as "No space left on device"."""
    return error.strerror or (str(error).splitlines() or [type(error).__name__])[0]


def temporary_name(path: Path) -> Path:
    """Returns an unused hidden name beside `path`. It is short, whatever the name of `path`.

    It holds the end of a long name, where records have their hash.
    """
    return path.with_name(f".{path.name[-48:]}.{uuid.uuid4().hex[:8]}{PARTIAL}")


def temporaries(path: Path) -> list[Path]:
    """Returns what processes that were killed while they wrote `path` have left beside it.

    Only who holds the lock of `path` may remove them: they may be of a process that still writes.
    """
    pattern = f".{glob.escape(path.name[-48:])}.{'[0-9a-f]' * 8}{PARTIAL}"
    return sorted(path.parent.glob(pattern))


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _call(write: Callable[[Path], object], path: Path) -> None:
    """Lets `write` make a file, which gets the mode of new files.

    safetensors makes private files, and like PyTorch it reports a full disk as an error of its own.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        write(path)
    except (RuntimeError, SafetensorError) as error:
        raise OSError(errno.EIO, str(error).splitlines()[0]) from error
    path.chmod(stat.S_IMODE(mode))

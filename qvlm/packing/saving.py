"""Where packed checkpoints are written: beside their folder first, and over nothing but their like.

Files go to `FOLDER.partial`. The first of them is a mark, so that an unfinished save is known as
one, and the last step renames the folder to `FOLDER`. A save that fails for want of space therefore
leaves `FOLDER` as it was. `require_own` refuses to replace anything but a packed checkpoint, and
that only if no other file lies in its folder.
"""

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError

from qvlm.errors import RunError, UserError
from qvlm.packing.origin import ORIGIN, read_origin
from qvlm.records.files import (
    PARTIAL,
    reason,
    sync,
    temporaries,
    temporary_name,
    write_file,
)

# Marks of an unfinished save: of one from memory, and of a stream, which can be resumed.
UNFINISHED = "unfinished"
PROGRESS = "progress.pt"


def resolve_folder(folder: str | Path) -> Path:
    """Returns the absolute path of a folder, without links, `.` and `..`; it need not exist.

    Raises:
        UserError: If it is not a path, or a loop of links.
    """
    try:
        return Path(folder).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"save_packed={str(folder)!r} is not a path of a folder ({error}). Give a new or an "
            "empty folder."
        ) from error


def partial_folder(folder: Path) -> Path:
    """Returns the folder that is filled before it is renamed to `folder`, a resolved path."""
    return folder.with_name(folder.name + PARTIAL) if folder.name else folder


def require_own(folder: Path, streamed: bool = False) -> None:
    """Makes sure that a save into a folder replaces nothing but saves.

    Args:
        folder: Folder, which need not exist.
        streamed: Whether the save resumes an unfinished stream, or begins one.

    Raises:
        UserError: If the folder holds other files than a finished save, or `FOLDER.partial` other
            files than an unfinished one.
    """
    resolved = resolve_folder(folder)
    remedy = "Give a new or an empty folder."
    if not resolved.name or os.path.ismount(resolved):
        raise UserError(f"save_packed={folder} is not a folder that can be renamed. {remedy}")
    if Path.cwd().is_relative_to(resolved):
        raise UserError(f"save_packed={folder} is the current folder or above it. {remedy}")
    if resolved.exists() and not resolved.is_dir():
        raise UserError(f"save_packed={folder} is not a folder. {remedy}")
    names = set(os.listdir(resolved)) if resolved.exists() else set()
    if names:
        try:
            origin = read_origin(resolved)
        except UserError as error:
            raise UserError(
                f"save_packed={folder} is not empty and holds no packed checkpoint of this "
                f"version. {remedy}"
            ) from error
        if others := sorted(names - {*origin.files, ORIGIN, UNFINISHED, PROGRESS}):
            raise UserError(
                f"save_packed={folder} holds {others[0]} beside a packed checkpoint, which would "
                f"be lost. {remedy}"
            )
    partial = partial_folder(resolved)
    if partial.exists() and not partial.is_dir():
        raise UserError(f"save_packed: {partial} is not a folder. Delete it or {remedy.lower()}")
    names = set(os.listdir(partial)) if partial.exists() else set()
    if not streamed and PROGRESS in names:
        raise UserError(
            f"save_packed: {partial} holds an unfinished stream. Add stream=true to resume it, "
            "delete it, or give another folder."
        )
    if names and not names & {UNFINISHED, PROGRESS} and not all(map(_is_temporary, names)):
        raise UserError(
            f"save_packed: {partial} holds other files. Delete it or give another folder."
        )


def save_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Saves a packed checkpoint from memory.

    Args:
        folder: Folder of the checkpoint.
        fill: Function that writes all files into the folder that it is given. Afterwards they get
            the mode that the user's umask gives to new files.

    Raises:
        UserError: If the folder holds anything but a save.
        RunError: If it cannot be written, or another save into it is going on. Then it is as it
            was before.
    """
    require_own(folder)
    folder = resolve_folder(folder)
    partial = partial_folder(folder)
    with ExitStack() as stack:
        if (partial / UNFINISHED).is_file():
            stack.enter_context(_held(partial))
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        with writing(folder):
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
            write_file(partial / UNFINISHED, "")
            stack.enter_context(_held(partial))
            fill(partial)
            mode = stat.S_IMODE((partial / UNFINISHED).stat().st_mode)
            for file in partial.iterdir():  # safetensors makes private files
                file.chmod(mode)
                sync(file)
            publish(partial, folder)


@contextmanager
def _held(partial: Path) -> Iterator[None]:
    """Holds the mark of an unfinished save, which its process holds until it ends.

    Raises:
        RunError: If another save holds it, whose files would be mixed with these.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield
        return
    with (partial / UNFINISHED).open("rb") as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"save_packed: another save into {partial} is going on. Wait for its end, or give "
                "another folder."
            ) from error
        except OSError:  # a file system without locks
            pass
        yield


def publish(partial: Path, folder: Path) -> None:
    """Renames a complete folder to its name, and deletes the save that it replaces.

    A save that a process replaced and was killed before it could delete it is deleted as well.

    Args:
        partial: Folder with a mark and the files of the checkpoint.
        folder: Resolved path of the checkpoint.

    Raises:
        UserError: If the folder holds anything but a save by now.
        OSError: If it cannot be renamed. Then the save before is unchanged.
    """
    require_own(folder, streamed=True)
    replaced = temporary_name(folder)
    sync(partial)
    if folder.exists():
        folder.rename(replaced)
    try:
        partial.rename(folder)
    except BaseException:
        if replaced.exists():
            replaced.rename(folder)
        raise
    sync(folder.parent)
    for mark in (UNFINISHED, PROGRESS):
        (folder / mark).unlink(missing_ok=True)
    for leftover in temporaries(folder):
        if leftover == replaced or (leftover / ORIGIN).exists():
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns errors of the disk in the block into one sentence.

    The libraries that write tensors and tokenizers report them as errors of their own.

    Raises:
        RunError: If a file in the folder cannot be written.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError):
            why = reason(error)
        elif isinstance(error, SafetensorError) or "(os error " in str(error):
            why = str(error).splitlines()[0]
        else:
            raise
        raise RunError(
            f"save_packed: {folder} cannot be written ({why}). Give the same command again once "
            "it can be."
        ) from error


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(PARTIAL)

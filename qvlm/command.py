"""What all commands have in common: options are parsed, errors become one line and an exit code."""

import argparse
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from qvlm.errors import RunError, UserError
from qvlm.validation import expanded_path

INTERRUPTED = 130
STARTING = "loading PyTorch, then checking options, checkpoint and data"  # what comes before a cell


def program() -> str:
    """Returns how this process was started, for messages: "qvlm", "python -m qvlm" or a script."""
    started = Path(sys.argv[0])
    if started.name == "__main__.py":
        return f"python -m {started.parent.name}"
    return started.name if started.suffix != ".py" else f"python {started.name}"


_OUT_OF_MEMORY = (
    *("can't allocate memory", "can't start new thread"),
    *("could not create a primitive", "could not execute a primitive"),
)


def run_command(
    parser: ArgumentParser, work: Callable[[Namespace], None], arguments: Sequence[str] | None
) -> int:
    """Parses the options of a command and does its work.

    A `UserError` or `RunError` becomes one line on stderr, as does what the system refuses. Any
    other exception keeps its traceback. If the reader of the output has gone, as `head` does, the
    command ends without a word.

    Args:
        parser: Parser of the command's options.
        work: Function that does the work with the options.
        arguments: Words of the command line; None stands for those of this process.

    Returns:
        Exit code: 0 after success, 2 after a `UserError`, 1 after anything that broke.
    """

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; see {parser.prog} --help")

    parser.error = refuse  # type: ignore[method-assign]
    return guarded(lambda: work(parser.parse_args(arguments)))


def guarded(work: Callable[[], None]) -> int:
    """Does the work of a command, and turns what went wrong into one line and an exit code.

    Args:
        work: Function that does the work; see `run_command`.
    """
    try:
        try:
            work()
        finally:
            sys.stdout.flush()  # what a pipe refuses shows here, and not while Python ends
    except BrokenPipeError:
        discard_output()
        return 1
    except Exception as error:
        if not is_expected(error):
            raise
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("interrupted: give the same command again.", file=sys.stderr)
        return INTERRUPTED
    return 0


@contextmanager
def busy(doing: str) -> Iterator[None]:
    """Shows that something is going on, with a spinner and what it is, if stderr is a terminal.

    Args:
        doing: What the block does, such as "loading PyTorch".
    """
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{doing} ..."):
        yield


def folder(value: str) -> Path:
    """Parses the path of an option: its "~" is expanded, and a path that cannot be is refused."""
    try:
        return Path(expanded_path("folder", value))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def sentence(error: Exception) -> str:
    """Returns one line that says what went wrong.

    What the system refuses, such as a full disk or a folder that was removed, is told as it tells
    it, with the file.
    """
    if _is_out_of_memory(error):
        return (
            f"memory ran out ({' '.join(str(error).split()) or type(error).__name__}). A smaller "
            "evaluation.batch_size or calibration.batch_size needs less, as does a smaller model."
        )
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename} cannot be used" if error.filename else "the system refused"
        return f"{place} ({error.strerror})"
    return " ".join(str(error).split())


def is_expected(error: Exception) -> bool:
    """Whether one sentence says more than a traceback: nothing is wrong with the code."""
    return isinstance(error, UserError | RunError | OSError) or _is_out_of_memory(error)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python or PyTorch, which is not imported for this, could not allocate memory.

    Some are known by their message alone: a thread without room for its stack, a product of oneDNN.
    """
    torchs = type(error).__name__ == "OutOfMemoryError"
    said = any(words in str(error) for words in _OUT_OF_MEMORY)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and (torchs or said))


def discard_output() -> None:
    """Sends what is left of the output nowhere, so that Python does not complain while it ends."""
    with suppress(OSError, ValueError):  # stdout may be no file at all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""A cell as a launcher runs it, in this process or in another one.

A launcher is a dataclass. Its fields are the options of `launcher=NAME` (`conf/launcher`), and its
`launch` yields, in any order, the position of each job and its outcome: the folder that the cell
left, or the exception. A job that fails has an outcome like any other, so the others go on.

Launchers and sweeps need not agree on who computes which cell. `qvlm.records.locks` makes sure
that one process at a time computes a cell. A job whose cell is locked by another process has the
outcome `Held`, and the sweep returns to that cell at its end. No job waits on a machine that it
occupies.
"""

import importlib.util
import os
import pickle
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

from qvlm.errors import RunError, UserError

if TYPE_CHECKING:  # importing it imports PyTorch
    from qvlm.cell.identity import Cell

Outcome = Path | Exception


@dataclass
class Job:
    """A cell to be run in the folder, with the imports and the arguments of the process that asks.

    Attributes:
        cell: Cell to run.
        folder: Folder that relative paths start from.
        imports: Folders that modules are searched for in.
        arguments: Command line, for the record.
    """

    cell: "Cell"
    folder: str = field(default_factory=os.getcwd)
    imports: list[str] = field(default_factory=lambda: list(sys.path))
    arguments: list[str] = field(default_factory=lambda: list(sys.argv))

    def __call__(self) -> Outcome:
        """Runs the cell. An unexpected exception is returned with its traceback as a note."""
        os.chdir(self.folder)
        sys.path += [path for path in self.imports if path not in sys.path]
        sys.argv = self.arguments
        from qvlm.cell.pipeline import run_cell

        try:
            self.cell.require_same_code()
            return run_cell(self.cell)
        except (UserError, RunError) as error:
            return error
        except Exception as error:
            error.add_note(traceback.format_exc())  # pickling drops the traceback itself
            return _portable(error)

    def checkpoint(self) -> Any:
        """What submitit queues before a job is preempted or out of time: the same job again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def __str__(self) -> str:
        return self.cell.config.title


class Launcher(Protocol):
    """Runs jobs."""

    def launch(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Outcome]]:
        """Yields the position of each job in `jobs` and its outcome, as the jobs end."""
        ...


def _portable(error: Exception) -> Exception:
    """An exception that another process can read: the same, or one with its name, text and notes.

    One that cannot be read would end the whole sweep.
    """
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # exceptions of libraries may hold anything, and take any arguments
        made = RuntimeError(f"{type(error).__name__}: {error}")
        for note in error.__notes__:
            made.add_note(note)
        return made
    return error


def run_job(job: Job) -> Outcome:
    """Runs a job; libraries that take functions take this one."""
    return job()


def report(outcome: Outcome) -> Outcome:
    """Prints what a job left whose own output goes elsewhere, and returns the outcome."""
    if isinstance(outcome, Path):
        tqdm.write(f"recorded {outcome}")
    return outcome


def require_package(package: str, extra: str) -> None:
    """Makes sure that the package of a launcher is installed.

    Args:
        package: Name of the package.
        extra: Name of the extra that installs it, which is also the launcher's name.

    Raises:
        UserError: if it is not; the sentence says how to install it.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"launcher={extra} needs {package}, which is not installed. Run "
            f".venv/bin/python -m pip install -c constraints.txt -e '.[{extra}]'"
        )

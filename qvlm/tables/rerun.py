"""Runs cells of committed answers anew, and compares answer by answer."""

import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from qvlm.cell.identity import Cell
from qvlm.cell.pipeline import run_cell
from qvlm.config.compose import compose, typed
from qvlm.config.schema import RunConfig
from qvlm.errors import RunError, UserError
from qvlm.models.load import embedded
from qvlm.records.record import Record
from qvlm.tables.answers import SUFFIX, letters_of, read_one
from qvlm.tables.claims.plan import FOLDER
from qvlm.tables.differences import Difference

METHODS = "qvlm.methods."


def rerun(folders: Sequence[Path], count: int) -> list[Difference]:
    """Runs random cells of committed answers, and prints what it compares.

    Only embedded models and their sisters are among them. The weights of others are not here, and
    their answers in float32 depend on the machine.

    Args:
        folders: Folders of committed answers. A cell that several of them hold counts once.
        count: Number of cells to run; all of them if there are fewer.

    Returns:
        A difference per question that was answered otherwise.

    Raises:
        UserError: If there are no committed answers, or a cell names a model that is not here.
        RunError: If a cell cannot be run.
    """
    files = {path.name: path for folder in folders for path in sorted(folder.glob(f"*{SUFFIX}"))}
    shuffled = map(read_one, random.sample([*files.values()], len(files)))
    chosen = list(islice(filter(_is_here, shuffled), count))
    if not chosen:
        raise UserError(
            "--rerun: there are no committed answers of an embedded model. Make a page first."
        )
    found: list[Difference] = []
    for committed in chosen:
        print(f"running {committed.name}", flush=True)
        with tempfile.TemporaryDirectory() as place:
            cell = Cell.of(configuration(committed, place))
            own = compare(committed, Record.load(run_cell(cell)))
        changed = "" if cell.code == committed.run["code"] else ", but the code has changed"
        said = f"{len(own)} answers differ{changed}" if own else "all answers are the same"
        print(f"{committed.name}: {said} ({len(committed.predictions)} questions)")
        found += own
    return found


def _is_here(committed: Record) -> bool:
    path = committed.config["model"].get("path")  # left out where it is of another machine
    sister = path is not None and Path(path).parent == Path(FOLDER) and Path(path).is_dir()
    return path is not None and (sister or embedded(path) is not None)


def configuration(committed: Record, results: str) -> RunConfig:
    """Returns the configuration that runs a cell of committed answers anew.

    Args:
        committed: Record that was read from committed answers.
        results: Folder for the new record.

    Raises:
        RunError: If the method is not one of this package, which alone may be run, or the
            checkpoint was in a folder of another machine.
    """
    options: dict[str, Any] = {
        **committed.config,
        "scale": asdict(compose([]).scale),  # of tables, not of cells; it grows with them
        "results_dir": results,
        "tracking": {"mode": "off", "dir": results},
    }
    target = str(options["method"].get("_target_"))
    if not target.startswith(METHODS):
        raise RunError(
            f"{committed.name}: {target} is not a method of this package; run it yourself"
        )
    if "path" not in options["model"]:
        raise RunError(f"{committed.name}: its checkpoint is not known here; run it yourself")
    return typed(options)


def compare(committed: Record, again: Record) -> list[Difference]:
    """Compares the answers of a cell with those of its new run, question by question."""
    if len(committed.predictions) != len(again.predictions):
        sizes = (f"{len(record.predictions)} questions" for record in (committed, again))
        return [Difference(committed.name, *sizes)]
    answers = zip(
        committed.predictions["question_id"], letters_of(committed), letters_of(again), strict=True
    )
    return [
        Difference(f"{committed.name}, question {question}", a, b)
        for question, a, b in answers
        if a != b
    ]

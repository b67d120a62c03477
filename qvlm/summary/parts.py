"""What the summaries of cells and of sweeps have in common."""

from collections.abc import Iterable, Mapping, Sequence
from shlex import quote
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from qvlm.command import program
from qvlm.errors import RunError
from qvlm.evaluation.metrics import CLASSES
from qvlm.evaluation.scores import Score, scores
from qvlm.records.record import Record, read_run
from qvlm.tables.comparison import drop
from qvlm.tables.report import NONE, interval, number, paired_interval, signed


def find_reference(record: Record, among: Iterable[Record] = ()) -> Record | None:
    """Finds the newest record in full precision of the same model, questions and seed.

    Args:
        record: Record of a quantized cell, or of any other.
        among: Records that are looked at first; then those in the folder of `record`.
    """
    if record.bit_widths.is_full_precision:
        return None
    here = [other for other in among if _is_reference(other.run, record)]
    if here:
        return max(here, key=lambda other: other.run["finished"])
    found = []
    for folder in record.path.parent.glob(f"{record.model}-fp-fp-*"):
        try:
            if _is_reference(run := read_run(folder), record):
                found.append((run["finished"], Record.load(folder)))
        except (OSError, ValueError, KeyError, TypeError, RunError):
            continue  # a damaged record is told when a table needs it
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _is_reference(run: Mapping[str, Any], record: Record) -> bool:
    own, other = record.run["influences"], run["influences"]
    return (
        other["bits"]["weights"] is None
        and all(own.get(part) == other[part] for part in ("model", "data", "evaluation", "seed"))
        and run["files_hashed"] == record.run["files_hashed"]
    )


def difference(record: Record, reference: Record | None, name: str) -> str:
    """Returns what quantization changed in a class, with its paired interval."""
    if reference is None:
        return "not recorded"
    if record.metrics["classes"][name]["n"] == 0:
        return NONE
    change = drop(_of_class(record, name), _of_class(reference, name))
    return f"{signed(change.difference)} ({paired_interval(change)})" if change else NONE


def _of_class(record: Record, name: str) -> Record:
    answers = record.predictions[CLASSES[name](record.predictions)]
    return Record(record.path, record.config, record.run, record.metrics, answers, record.layers)


def refused(what: str, reason: str) -> Text:
    """Says that tables refuse a record, and why."""
    return Text(f"{what}: tables refuse this record. {reason}", "bold red")


def report_place(records: Sequence[Record]) -> Text:
    """Says where the report of the records is, or how to make it."""
    results = {record.path.parent.parent: None for record in records}
    pages = [folder / "report" / "index.html" for folder in results]
    where = [
        str(page) if page.is_file() else f"{program()} report {quote(f'--results={folder}')}"
        for page, folder in zip(pages, results, strict=True)
    ]
    return Text(", ".join(where), overflow="fold")


def asked(record: Record) -> str:
    """Says what a record was evaluated on."""
    if record.kind == "tasks":
        return f"tasks {', '.join(record.config['tasks']['names'])}"
    data = record.config["data"]
    kind = "documents" if record.kind == "text" else "questions"
    return f"{len(record.predictions):,} {kind} of {data['name']}, split {data['split']}"


def scores_of(record: Record) -> list[Score]:
    """Returns the scores of a record's tasks."""
    return list(scores(record.metrics["tasks"]["results"]))


def seconds(record: Record) -> float:
    """Returns the seconds of all stages of a cell."""
    return sum(stage["seconds"] for stage in record.run["stages"].values())


def accuracy(row: dict[str, Any]) -> str:
    """Returns the accuracy of a class and its interval."""
    return f"{number(row['accuracy'])} ({interval(row)})" if row["n"] else NONE


def new_table(*columns: str, left: int = 1) -> Table:
    """Returns an empty table, its first columns to the left and its others to the right."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    return table

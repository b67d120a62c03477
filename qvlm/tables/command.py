"""What all tables share: two files made from the records of a folder, and the command for it."""

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from qvlm.config.schema import TrackingConfig
from qvlm.errors import RunError, UserError
from qvlm.records import files
from qvlm.records.record import Record, find_records
from qvlm.records.tracking import log_table
from qvlm.tables.selection import Selection, select


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        name: of its files, its module, its experiment and its make target.
        title: as people call it.
        wanted: which records are its affair.
        long: its rows in long form.
        render: its page, made from a selection and the command that regenerates it.
    """

    name: str
    title: str
    wanted: Callable[[Record], bool]
    long: Callable[[Selection], pd.DataFrame]
    render: Callable[[Selection, str], str]


def run(table: Table, arguments: Sequence[str] | None = None) -> int:
    """`python -m qvlm.tables.<name>`; returns its exit code."""
    module = f"qvlm.tables.{table.name}"
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=f"Makes {table.title} from recorded runs."
    )
    parser.add_argument("--runs", type=Path, default=Path("results/runs"), help="the records")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where to write")
    parser.add_argument("--command", help="what the page names as the way to make it")
    parser.add_argument(
        "--tracking",
        choices=("off", "offline", "online"),
        help="Weights & Biases; by default as the newest record was tracked",
    )
    given = parser.parse_args(arguments)
    default = ["python", "-m", module, "--runs", str(given.runs), "--out", str(given.out)]
    try:
        records = find_records(given.runs)
        if not records:
            raise UserError(
                f"--runs: {given.runs} holds no records; give the folder that "
                f"python run.py -m experiment={table.name} writes"
            )
        selection = select(records, table.wanted)
        csv, page = write(table, selection, given.out, given.command or shlex.join(default))
        print(page.read_text(encoding="utf-8"), end="")
        for entry in selection.refused:
            print(f"warning: refused {entry.record.name}: {entry.reason}", file=sys.stderr)
        if selection.shown:
            newest = max(selection.shown, key=lambda record: record.run["finished"]).config
            tracking = TrackingConfig(**newest["tracking"])
            log_table(
                csv, page, replace(tracking, mode=given.tracking or tracking.mode), newest["group"]
            )
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


def write(table: Table, selection: Selection, out: Path, made_by: str) -> tuple[Path, Path]:
    """Writes `<name>.csv` and `<name>.md`, each whole or not at all; see the tables' `write`."""
    csv = table.long(selection).to_csv(index=False, float_format="%.2f", lineterminator="\n")
    paths = out / f"{table.name}.csv", out / f"{table.name}.md"
    write_files(dict(zip(paths, (csv, table.render(selection, made_by)), strict=True)))
    return paths


def write_files(texts: Mapping[Path, str]) -> None:
    """Writes files of one folder beside their places, then moves them there: all whole or none.

    Raises:
        UserError: if the folder, which is made if need be, cannot be written.
    """
    folder = next(iter(texts)).parent
    with files.explained(f"--out: {folder}", UserError, "choose a folder that can be written"):
        files.write_files(texts)

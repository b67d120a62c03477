"""What the commands of all tables have in common: their options, their records, their two files."""

import argparse
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from qvlm.command import folder, run_command
from qvlm.config.schema import TrackingConfig
from qvlm.errors import UserError
from qvlm.records import files
from qvlm.records.cells import cell_of
from qvlm.records.record import Record, find_records
from qvlm.records.tracking import log_table
from qvlm.tables.answers import folder_of, obstacle, read_answers, write_answers
from qvlm.tables.selection import Selection, select

FINE = ("kl", "kl_error")  # columns of a CSV with five decimals; the others have two


@dataclass(frozen=True)
class Table:
    """A table of the paper that is a pure function of records.

    Attributes:
        name: Name of its files, its module, its experiment and its make target.
        title: Name in messages, such as "Table 2".
        wanted: Whether a record concerns the table.
        long: Function that returns the rows of its CSV for a selection of records.
        render: Function that returns its page for a selection and the command that regenerates it.
    """

    name: str
    title: str
    wanted: Callable[[Record], bool]
    long: Callable[[Selection], pd.DataFrame]
    render: Callable[[Selection, str], str]


def run(table: Table, arguments: Sequence[str] | None = None) -> int:
    """Runs `python -m qvlm.tables.<name>` and returns its exit code."""
    parser = table_parser(table.name, f"Makes {table.title} from recorded runs.")
    add_runs(parser)
    add_committed(parser)
    parser.add_argument(
        "--tracking",
        choices=("off", "offline", "online"),
        help="Weights & Biases (default: as the newest record was tracked)",
    )

    def work(options: argparse.Namespace) -> None:
        selection = select(records_for(options, table.name), table.wanted)
        csv, page = write(table, selection, options.out, made_with(parser, options, "runs", "out"))
        keep_answers(options.out, table.name, selection.all())
        print(page.read_text(encoding="utf-8"), end="")
        for entry in selection.refused:
            print(f"warning: refused {entry.record.name}: {entry.reason}", file=sys.stderr)
        # Committed answers do not say how they were tracked.
        own = [record for record in selection.shown if "tracking" in record.config]
        if own:
            newest = max(own, key=lambda record: record.run["finished"]).config
            tracking = TrackingConfig(**newest["tracking"])
            mode = options.tracking or tracking.mode
            log_table(csv, page, replace(tracking, mode=mode), newest["group"], selection.shown)
        elif options.tracking not in (None, "off"):
            print(
                f"note: {table.name} is not tracked, because --runs has no record that it shows",
                file=sys.stderr,
            )

    return run_command(parser, work, arguments)


def table_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Returns a parser of the options that the commands of all tables have.

    Args:
        name: Name of the table's module.
        description: Sentence that `--help` shows.
    """
    parser = argparse.ArgumentParser(prog=f"python -m qvlm.tables.{name}", description=description)
    parser.add_argument(
        "--out",
        type=folder,
        default=Path("results"),
        help="folder for the files (default: %(default)s)",
    )
    parser.add_argument("--command", help="command that the page names (default: this one)")
    return parser


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Adds the option of tables that are made from records."""
    parser.add_argument(
        "--runs",
        type=folder,
        default=Path("results/runs"),
        help="folder of records (default: %(default)s)",
    )


def add_committed(parser: argparse.ArgumentParser) -> None:
    """Adds the option of tables whose answers are committed, which `records_for` follows."""
    parser.add_argument(
        "--add",
        action="store_true",
        help="keep the cells of the committed answers beside the page that RUNS does not have",
    )


def made_with(parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> str:
    """Returns the command that a page names: `--command`, or this command.

    Args:
        parser: Parser of the command.
        options: Options of the command.
        names: Names of the options that the command repeats where they have a value.
    """
    words = parser.prog.split()
    for name in names:
        value = getattr(options, name)
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return options.command or shlex.join(words)


def records_of(runs: Path, experiment: str, kind: str = "problems") -> list[Record]:
    """Returns the records of a folder.

    Args:
        runs: Folder of records.
        experiment: Experiment whose sweep writes the records that the table needs.
        kind: What they were evaluated on; see `Record.kind`.

    Raises:
        UserError: If there are none.
        RunError: If one of them is damaged.
    """
    records = find_records(runs, kind)
    if not records:
        raise UserError(
            f"--runs: {runs} holds no records. Give the folder that "
            f"`python run.py -m experiment={experiment}` writes."
        )
    return records


def records_for(options: argparse.Namespace, page: str, kind: str = "problems") -> list[Record]:
    """Returns the records that a page is made of, by `add_runs` and `add_committed`.

    They are those of `--runs` and, with `--add`, those of the committed answers whose cell is not
    among them, in whichever version of the code.

    Args:
        options: Options of the command.
        page: Name of the page.
        kind: What the records were evaluated on; see `Record.kind`.

    Raises:
        UserError: If there are none.
        RunError: If one of them is damaged.
    """
    if not options.add:
        return records_of(options.runs, page, kind)
    records = find_records(options.runs, kind)
    own = {cell_of(record.run) for record in records}
    committed = read_answers(folder_of(options.out, page))
    records += [record for record in committed if cell_of(record.run) not in own]
    return records or records_of(options.runs, page, kind)


def write(table: Table, selection: Selection, out: Path, made_with: str) -> tuple[Path, Path]:
    """Writes `<name>.csv` and `<name>.md`, each of them whole or not at all.

    Returns:
        Paths of the two files.

    Raises:
        UserError: If the folder cannot be written.
    """
    texts = texts_of(table, selection, made_with)
    write_files({out / name: text for name, text in texts.items()})
    return out / f"{table.name}.csv", out / f"{table.name}.md"


def texts_of(table: Table, selection: Selection, made_with: str) -> dict[str, str]:
    """Returns the text of a table's two files by their names."""
    frame = table.long(selection)
    for column in frame.columns.intersection(list(FINE)):
        frame[column] = frame[column].map("{:.5f}".format, na_action="ignore")
    csv = frame.to_csv(index=False, float_format="%.2f", lineterminator="\n")
    return {f"{table.name}.csv": csv, f"{table.name}.md": table.render(selection, made_with)}


def keep_answers(
    out: Path, page: str, records: Sequence[Record], facts: Mapping[str, Any] | None = None
) -> None:
    """Writes the answers behind a page beside it, so that `make verify` can check the page.

    If a record cannot be kept, then none is: the page could not be checked as a whole. The command
    says so, and the answers of an older page are removed.

    Args:
        out: Folder of the page.
        page: Name of the page.
        records: Records that the page shows or names.
        facts: What else the page shows, as JSON can hold it, or None.

    Raises:
        UserError: If the folder cannot be written.
    """
    folder = folder_of(out, page)
    for record in records:
        if reason := obstacle(record):
            shutil.rmtree(folder, ignore_errors=True)
            print(
                f"note: {page} is not kept for make verify: {record.name}: {reason}",
                file=sys.stderr,
            )
            return
    write_answers(folder, records, facts)


def write_files(texts: Mapping[Path, str]) -> None:
    """Writes the files of one folder, each of them whole or not at all.

    Raises:
        UserError: If the folder, which is created if needed, cannot be written.
    """
    folder = next(iter(texts)).parent
    with files.explained(f"--out: {folder}", UserError, "choose a folder that can be written"):
        files.write_files(texts)


def run_pure(
    name: str,
    about: str,
    texts: Callable[[Sequence[Record], str], Mapping[str, str]],
    concerned: Callable[[Sequence[Record]], Sequence[Record]],
    arguments: Sequence[str] | None,
    kind: str = "problems",
) -> int:
    """Runs the command of a page that is a pure function of the records, and returns its exit code.

    Args:
        name: Name of the page and of its command.
        about: What the command does, in a sentence.
        texts: Function from the records of a folder and the command that makes the page anew to the
            texts of its files, by name; NAME.md is printed.
        concerned: Chooses the records whose answers are kept beside the page.
        arguments: Words of the command line.
        kind: What the records were evaluated on; see `Record.kind`.
    """
    parser = table_parser(name, about)
    add_runs(parser)
    add_committed(parser)

    def work(options: argparse.Namespace) -> None:
        records = records_for(options, name, kind)
        made = texts(records, made_with(parser, options, "runs", "out"))
        write_files({options.out / file: text for file, text in made.items()})
        keep_answers(options.out, name, concerned(records))
        print(made[f"{name}.md"], end="")

    return run_command(parser, work, arguments)

"""`python -m qvlm report` writes the report of a folder of records."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from qvlm.command import folder, program, run_command
from qvlm.errors import UserError
from qvlm.records.files import explained, write_file
from qvlm.records.record import find_records
from qvlm.report.costs import read_table4
from qvlm.report.page import page
from qvlm.tables.sensitivity.rows import read as read_sensitivity

PUBLIC, PRIVATE = "index.html", "private.html"


def write(results: Path, made_with: str, private: bool = False) -> Path:
    """Writes the report of the records in a results folder.

    Args:
        results: Folder that holds `runs`, and perhaps `table4.csv` and `sensitivity.csv`.
        made_with: Command that the page names.
        private: Whether the page stays on this machine, so that it may hold any data set's texts.

    Returns:
        Path of the page: `report/index.html` in the results folder, or `report/private.html`.

    Raises:
        UserError: If there are no records, or the page cannot be written.
        RunError: If a record is damaged.
    """
    runs = results / "runs"
    records = [*find_records(runs), *find_records(runs, "text")]
    if not records:
        raise UserError(
            f"--results: {results / 'runs'} holds no records. Give the results_dir of a run."
        )
    text = page(records, made_with, read_table4(results), private, read_sensitivity(results))
    path = results / "report" / (PRIVATE if private else PUBLIC)
    with explained(f"--results: {path}", UserError, "choose a folder that can be written"):
        write_file(path, text)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog=f"{program()} report", description="Writes a page that shows what the records say."
    )
    parser.add_argument(
        "--results",
        type=folder,
        default=Path("results"),
        help="folder that holds runs, and gets report/index.html (default: %(default)s)",
    )
    parser.add_argument(
        "--private",
        action="store_true",
        help="write report/private.html, with the texts of any data set, not to be passed on",
    )
    parser.add_argument("--command", help="command that the page names (default: this one)")

    def work(options: argparse.Namespace) -> None:
        words = [*parser.prog.split(), "--results", str(options.results)]
        command = options.command or shlex.join(words + ["--private"] * options.private)
        print(f"wrote {write(options.results, command, options.private)}")

    return run_command(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())

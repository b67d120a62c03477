"""`python -m qvlm sensitivity model=NAME` writes `sensitivity.csv`, `.md` and `.png`."""

import argparse
import io
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from qvlm.cell.identity import Cell, resolve
from qvlm.command import run_command
from qvlm.config.compose import compose
from qvlm.errors import UserError
from qvlm.records.files import explained, write_files
from qvlm.tables.command import table_parser
from qvlm.tables.sensitivity import NAME
from qvlm.tables.sensitivity.measure import kept_in, measure, require_switchable, with_questions
from qvlm.tables.sensitivity.page import page
from qvlm.tables.sensitivity.plot import plot
from qvlm.tables.sensitivity.rows import CSV, read, rows_of
from qvlm.validation import whole_number

CELL = ["model", "method", "bits"]  # columns that name the rows of one run
SPLIT = "data.split=validation"  # unless the command says otherwise


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = table_parser(NAME, "Measures which part of a model its loss comes from.")
    parser.add_argument("overrides", nargs="*", help="options of run.py, such as model=NAME")
    parser.add_argument(
        "--problems", type=int, default=256, help="questions to compare (default: %(default)s)"
    )
    parser.add_argument(
        "--answers",
        type=int,
        default=128,
        help="questions to answer in each state; 0 for none (default: %(default)s)",
    )

    def work(options: argparse.Namespace) -> None:
        whole_number("--problems", options.problems, 2)
        whole_number("--answers", options.answers, 0)
        config = resolve(compose([SPLIT, *options.overrides]))
        require_switchable(config)
        cell = Cell.of(with_questions(config, options.problems, options.answers))
        folder = kept_in(cell, options.answers)
        rows = rows_of(cell, *measure(cell, options.answers, folder))
        text = _write(options.out, rows, options.command or f"{parser.prog} model=NAME")
        shutil.rmtree(folder, ignore_errors=True)
        print(text, end="")

    return run_command(parser, work, arguments)


def _write(out: Path, rows: pd.DataFrame, command: str) -> str:
    """Writes the three files with the rows of a model beside those of others; returns the page."""
    before = read(out)
    if before is not None:
        same = (before[CELL] == rows.iloc[0][CELL]).all(axis=1)
        rows = pd.concat([before[~same], rows])
    rows = rows.sort_values(CELL, kind="stable")
    csv = rows.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    rows = pd.read_csv(io.StringIO(csv))  # the page shows what the CSV holds
    text, picture = page(rows, command), plot(rows)
    texts = {out / CSV: csv, out / f"{NAME}.md": text}
    with explained(f"--out: {out}", UserError, "choose a folder that can be written"):
        write_files({**texts, out / f"{NAME}.png": picture})
    return text


if __name__ == "__main__":
    sys.exit(main())

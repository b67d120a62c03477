"""The command that makes the page of claims from recorded runs."""

import argparse
from collections.abc import Sequence

from qvlm.command import run_command
from qvlm.tables.claims.analysis import concerned
from qvlm.tables.claims.page import page
from qvlm.tables.command import (
    add_runs,
    keep_answers,
    made_with,
    records_of,
    table_parser,
    write_files,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = table_parser("claims", "Says which of the paper's claims the records support.")
    add_runs(parser)

    def work(options: argparse.Namespace) -> None:
        records = records_of(options.runs, "claims")
        text = page(records, made_with(parser, options, "runs", "out"))
        write_files({options.out / "claims.md": text})
        keep_answers(options.out, "claims", concerned(records))
        print(text, end="")

    return run_command(parser, work, arguments)

"""`python -m qvlm.tables.claims` says which of the paper's claims the records support."""

import argparse
import sys
from collections.abc import Sequence

from qvlm.command import run_command
from qvlm.tables.claims.page import page
from qvlm.tables.command import add_runs, made_with, records_of, table_parser, write_files


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = table_parser("claims", "Says which of the paper's claims the records support.")
    add_runs(parser)

    def work(options: argparse.Namespace) -> None:
        records = records_of(options.runs, "claims")
        text = page(records, made_with(parser, options, "runs", "out"))
        write_files({options.out / "claims.md": text})
        print(text, end="")

    return run_command(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())

"""Prints the summary of what a command computed."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from qvlm.errors import RunError
from qvlm.records.record import Record
from qvlm.summary.cell import DESCRIBED_WIDTH, cell_summary
from qvlm.summary.sweep import sweep_summary

PLAIN_WIDTH = 120  # columns, where no terminal says how many there are


def print_summary(paths: Sequence[Path]) -> None:
    """Prints the summary of one recorded cell, or the comparison of several.

    Args:
        paths: Folders that the cells left. A packed model without a record is left out.
    """
    try:
        records = [Record.load(path) for path in dict.fromkeys(paths) if _is_recorded(path)]
    except RunError as error:  # the cells are recorded, and tables say what is wrong with them
        print(f"warning: there is no summary, because {error}", file=sys.stderr)
        return
    if records:
        console = Console(highlight=False)
        console.width = console.width if console.is_terminal else PLAIN_WIDTH
        if len(records) == 1:
            console.print(cell_summary(records[0], described=console.width >= DESCRIBED_WIDTH))
        else:
            console.print(sweep_summary(records))


def _is_recorded(path: Path) -> bool:
    return (path / "run.json").is_file()

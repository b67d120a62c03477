"""`python -m qvlm.tables.table4` writes `table4.csv` and `table4.md`."""

import argparse
import sys
from collections.abc import Sequence

import pandas as pd

from qvlm.cell.inputs import find_device
from qvlm.command import folder, run_command
from qvlm.tables.command import add_runs, made_with, table_parser, write_files
from qvlm.tables.cost import COLUMNS
from qvlm.tables.table4.measure import measure
from qvlm.tables.table4.page import Setting, page
from qvlm.tables.table4.subjects import find_subjects
from qvlm.validation import whole_number


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = table_parser("table4", "Measures the time and memory of packed models.")
    add_runs(parser)
    parser.add_argument(
        "--packed", type=folder, help="folder of packed checkpoints (default: packed beside --runs)"
    )
    parser.add_argument("--questions", type=int, default=16, help="number asked in each repeat")
    parser.add_argument("--repeats", type=int, default=7, help="number of timed repeats")
    parser.add_argument("--device", default="auto", help="auto, cpu, or cuda")

    def work(options: argparse.Namespace) -> None:
        for name in ("questions", "repeats"):
            whole_number(f"--{name}", getattr(options, name), 1)
        device = find_device(options.device)
        packed = options.packed or options.runs.parent / "packed"
        found = find_subjects(options.runs, packed, device)
        rows = [
            row
            for subjects in found.values()
            for row in measure(subjects, options.questions, options.repeats)
        ]
        names = ("runs", "packed", "out", "questions", "repeats", "device")
        command = made_with(parser, options, *names)
        text = page(rows, Setting(options.questions, options.repeats, device, command))
        frame = pd.DataFrame([row.columns for row in rows]).reindex(columns=list(COLUMNS))
        csv = frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        write_files({options.out / "table4.csv": csv, options.out / "table4.md": text})
        print(text, end="")

    return run_command(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())

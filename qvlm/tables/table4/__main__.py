"""`python -m qvlm.tables.table4` writes `table4.csv` and `table4.md`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch

from qvlm.cell.inputs import find_device
from qvlm.command import folder, run_command
from qvlm.records.environment import revision_in_words, surroundings
from qvlm.tables.command import add_runs, keep_answers, made_with, table_parser, write_files
from qvlm.tables.table4.facts import Facts
from qvlm.tables.table4.measure import measure
from qvlm.tables.table4.page import texts_of
from qvlm.tables.table4.subjects import find_subjects, records_of
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
        about = surroundings()
        facts = Facts(
            options.questions,
            options.repeats,
            device,
            torch.get_num_threads(),
            about["hardware"],
            about["versions"],
            revision_in_words(about["git"]),
            [measure(own, options.questions, options.repeats) for own in found.values()],
        )
        records = {record.name: record for own in found.values() for record in records_of(own)}
        names = ("runs", "packed", "out", "questions", "repeats", "device")
        texts = texts_of(facts, records, made_with(parser, options, *names))
        write_files({options.out / name: text for name, text in texts.items()})
        keep_answers(options.out, "table4", list(records.values()), asdict(facts))
        print(texts["table4.md"], end="")

    return run_command(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())

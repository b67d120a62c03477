"""Table 3: `python -m qvlm.tables.table3`, LLaVA-1.5 on ScienceQA, VizWiz and VQAv2.

SQA is the accuracy on the questions with an image of ScienceQA's test split, from records on
problems. The others are from records on the tasks `vizwiz` and `vqav2`, whose data a user has to
have. Rows and columns that nobody measured say so.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from qvlm.bits import BitWidths
from qvlm.command import run_command
from qvlm.errors import UserError
from qvlm.evaluation.scores import scores
from qvlm.evaluation.vqa import NAMES
from qvlm.markdown import bullets, table
from qvlm.records.record import Record, find_records
from qvlm.tables.command import add_runs, made_with, table_parser, write_files
from qvlm.tables.labels import FP, bits_order, method_order
from qvlm.tables.published import label, paper_model, published, rows
from qvlm.tables.report import NOT_MEASURED, hardware, left_out, number, revision
from qvlm.tables.selection import Selection, select

NAME = "table3"
GROUPS = (NAME, "table3_sqa")  # of its two experiments
SQA = "SQA"
DATASETS = (SQA, NAMES["vizwiz"], NAMES["vqav2"])

HEAD = """\
# Table 3: visual question answering, accuracy in percent

SQA is ScienceQA's test split, questions with an image. VizWiz and VQAv2 are their validation
splits, on as many questions as *questions* says, scored by ten people's answers. The paper's
numbers for these two are of the test splits, whose answers are not public, so that a row in
*italics* shows the order of the methods and what quantization costs, and not the values to reach.
Parentheses hold standard errors."""

Value = tuple[float, float | None, int]
"""Accuracy in percent, its standard error, and the number of questions."""


def measured(record: Record) -> dict[str, Value]:
    """Returns what a record says about the table's data sets, by their names."""
    if record.kind == "problems":
        row = record.metrics["classes"]["IMG"]
        share = row["accuracy"] / 100 if row["n"] else 0.0
        error = 100 * (share * (1 - share) / row["n"]) ** 0.5 if row["n"] else None
        return {SQA: (row["accuracy"], error, row["n"])} if row["n"] else {}
    tasks = record.metrics["tasks"]
    return {
        NAMES[task]: (100 * value, error and 100 * error, tasks["n-samples"][task]["effective"])
        for task, metric, value, error in scores(tasks["results"])
        if task in NAMES and metric == "accuracy"
    }


def choose(runs: Path) -> Selection:
    """Chooses the records of the table. Those on problems and on tasks have settings of their own.

    Raises:
        RunError: If a record is damaged.
    """
    chosen = Selection()
    for kind in ("problems", "tasks"):
        own = select(find_records(runs, kind), _is_of_table)
        chosen.shown.extend(own.shown)
        chosen.refused.extend(own.refused)
        chosen.set_aside.extend(own.set_aside)
    return chosen


def long(selection: Selection) -> pd.DataFrame:
    """Returns the rows of the CSV: one per model, bit widths, method and data set."""
    found = [
        {
            **{"model": record.model, "bits": record.bits, "method": record.method},
            **{"dataset": dataset, "n": n, "accuracy": accuracy, "standard_error": error},
            "paper_accuracy": _printed(record).get(dataset),
            "run": record.name,
        }
        for record in selection.shown
        for dataset, (accuracy, error, n) in measured(record).items()
    ]
    return pd.DataFrame(found)


def page(selection: Selection, made_with: str) -> str:
    """Returns the page of the records that may be shown."""
    records = selection.shown
    parts = [HEAD]
    for model in sorted({record.model for record in records}):
        parts += [f"## {model}", _accuracies([r for r in records if r.model == model])]
    parts += left_out(selection)
    facts = [f"Command: `{made_with}`", f"Records: {len(records)}."]
    facts += [f"Hardware: {'; or '.join(dict.fromkeys(map(hardware, records)))}."]
    facts += [f"Code: {'; or '.join(dict.fromkeys(map(revision, records)))}."]
    return "\n\n".join([*parts, "## How this page was made", bullets(facts)]) + "\n"


def _accuracies(records: Sequence[Record]) -> str:
    """Returns the table of one model: a row for each method, and the paper's row below it."""
    cells: dict[tuple[BitWidths, str], dict[str, Value]] = {}
    for record in records:
        cells.setdefault((record.bit_widths, record.method), {}).update(measured(record))
    lines = []
    for bits, method in sorted(cells, key=lambda at: (bits_order(at[0]), method_order(at[1]))):
        own = cells[bits, method]
        count = ", ".join(f"{own[name][2]:,}" if name in own else "-" for name in DATASETS)
        values = [_shown(own.get(name)) for name in DATASETS]
        lines.append([f"**{method}**", bits.label, *values, count])
        record = next(r for r in records if (r.bit_widths, r.method) == (bits, method))
        if printed := _printed(record):
            paper = [f"*{number(printed[name])}*" for name in DATASETS]
            lines.append(["", f"*paper, {label(str(paper_model(record)))}*", *paper, ""])
    return table(["method", "bits", *DATASETS, "questions"], lines, left=2)


def _shown(value: Value | None) -> str:
    if value is None:
        return NOT_MEASURED
    accuracy, error, _ = value
    return number(accuracy) if error is None else f"{number(accuracy)} ({number(error)})"


def _printed(record: Record) -> dict[str, float]:
    """Returns what the paper prints for a record's model, method and bit widths, by data set."""
    full = record.bit_widths.is_full_precision
    column = FP if full else f"{record.bits}_{record.method}"
    own = published(NAME).query("model == @model", local_dict={"model": paper_model(record)})
    return {row["dataset"]: row[column] for row in rows(own)} if column in own else {}


def _is_of_table(record: Record) -> bool:
    return record.config["group"] in GROUPS


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = table_parser(NAME, "Makes Table 3 from recorded runs.")
    add_runs(parser)

    def work(options: Namespace) -> None:
        found = choose(options.runs)
        if not found.all():
            raise UserError(
                f"--runs: {options.runs} holds no records of Table 3. Give the folder that "
                f"`python run.py -m experiment={NAME}` writes."
            )
        text = page(found, made_with(parser, options, "runs", "out"))
        csv = long(found).to_csv(index=False, float_format="%.2f", lineterminator="\n")
        write_files({options.out / f"{NAME}.csv": csv, options.out / f"{NAME}.md": text})
        print(text, end="")

    return run_command(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())

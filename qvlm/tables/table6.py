"""Table 6: `python -m qvlm.tables.table6`, methods under each granularity of the activations.

The paper compares Q-VLM with scales per token (ZeroQuant-V2). Whether a method or the granularity
of its scales makes the difference shows only if both vary, so this table crosses them. It is a pure
function of the records: per granularity, the records are chosen as for any other table.
"""

import sys
from collections.abc import Sequence

import pandas as pd

from qvlm.markdown import table
from qvlm.records.record import Record
from qvlm.tables.command import run_pure
from qvlm.tables.comparison import compare_pairs, drop
from qvlm.tables.crossed import Crossed, crossed_by
from qvlm.tables.granularity import GRANULARITIES, activations
from qvlm.tables.labels import BASELINE, FP, QVLM
from qvlm.tables.published import label, published, rows
from qvlm.tables.report import (
    interval,
    left_out,
    made_by,
    number,
    paired_interval,
    paired_tests,
    signed,
)

NAME = "table6"
TOKEN = "ZeroQuant-V2, per token"  # the paper's ZeroQuant-V2
COLUMNS = (
    *("model", "activations", "method", "bits", "n", "accuracy", "ci_low", "ci_high"),
    *("against_fp", "against_fp_low", "against_fp_high", "run"),
)
HEAD = """\
# Table 6: granularities of activations against methods

A method chooses weights, ranges and folds. The granularity says how many scales the activations of
the language model have: one per tensor, one per cluster of channels or one per channel, all static,
or one per token, made while the model runs. The vision tower has the same quantizer in all rows.
*ZeroQuant-V2, per token* is rounding to nearest with scales per token. Accuracy is in percent on
all questions, and an answer that names no choice counts as wrong.

Rows that begin with *paper* are what the paper prints for larger models, whose Q-VLM has scales per
channel by its text."""


def cross(records: Sequence[Record]) -> Crossed:
    """Chooses the records of each granularity as for a table of its own."""
    return crossed_by(records, activations, [*GRANULARITIES.values()], ["quantizer"])


def long(crossed: Crossed) -> pd.DataFrame:
    """Returns the rows of the CSV, with the columns `COLUMNS`; accuracy is in percent."""
    found = []
    for record in crossed.selection.shown:
        average = record.metrics["classes"]["Avg"]
        fall = drop(record, crossed.full.get(record.model))
        whole = record.bit_widths.is_full_precision
        found.append(
            {
                "model": record.model,
                "activations": FP if whole else activations(record),
                **dict(method=record.method, bits=record.bits),
                **{key: average[key] for key in ("n", "accuracy", "ci_low", "ci_high")},
                "against_fp": None if whole or fall is None else fall.difference,
                "against_fp_low": None if whole or fall is None else fall.low,
                "against_fp_high": None if whole or fall is None else fall.high,
                "run": record.name,
            }
        )
    return pd.DataFrame(found, columns=list(COLUMNS))


def page(crossed: Crossed, command: str) -> str:
    """Returns the page.

    Args:
        crossed: Records from `cross`.
        command: Command that regenerates the page.
    """
    parts = [HEAD]
    for model, records in crossed.shown.items():
        full = crossed.full.get(model)
        for bits in dict.fromkeys(record.bits for record in records):
            own = [record for record in records if record.bits == bits]
            parts += [f"## {model}, {bits}", _rows(own, full)]
            for words in dict.fromkeys(map(activations, own)):
                alike = [r for r in own if activations(r) == words and r.method != BASELINE]
                pairs = [(record.method, BASELINE) for record in alike]
                both = [record for record in own if activations(record) == words]
                if pairs and len(both) > len(pairs):
                    parts += [f"Paired tests, {words}:", paired_tests(*compare_pairs(both, pairs))]
    parts += left_out(crossed.selection)
    parts += made_by(crossed.selection.shown, command)
    return "\n\n".join(parts) + "\n"


def _rows(records: Sequence[Record], full: Record | None) -> str:
    header = ["method", "activations", "accuracy", "95 % interval", "against FP", "95 % interval"]
    lines = []
    if full is not None:
        average = full.metrics["classes"]["Avg"]
        lines.append([f"**{FP}**", "", number(average["accuracy"]), interval(average), "", ""])
    for record in records:
        average, fall = record.metrics["classes"]["Avg"], drop(record, full)
        lines.append(
            [
                *(f"**{record.method}**", activations(record), number(average["accuracy"])),
                interval(average),
                signed(fall.difference) if fall else "",
                paired_interval(fall) if fall else "",
            ]
        )
    ours = {"ZeroQuant-V2": TOKEN, QVLM: QVLM}
    shown = {record.method for record in records}
    for row in rows(published(NAME)):
        accuracy = row.get(f"{records[0].bits}_accuracy")
        if accuracy is not None and ours[row["method"]] in shown:
            name = f"*paper, {label(row['model'])}, {row['method']}*"
            lines.append([name, "", f"*{accuracy:.2f}*", "", "", ""])
    return table(header, lines, left=2)


def texts_of(records: Sequence[Record], command: str) -> dict[str, str]:
    """Returns the text of the two files by their names."""
    crossed = cross(records)
    csv = long(crossed).to_csv(index=False, float_format="%.2f", lineterminator="\n")
    return {f"{NAME}.csv": csv, f"{NAME}.md": page(crossed, command)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    about = "Makes Table 6 from recorded runs."
    return run_pure(NAME, about, texts_of, lambda found: cross(found).selection.all(), arguments)


if __name__ == "__main__":
    sys.exit(main())

"""The page: what each part costs alone, and what it saves to leave it in floating point."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from qvlm.markdown import bullets, table
from qvlm.tables.report import NONE, signed
from qvlm.tables.sensitivity.parts import (
    ACTIVATIONS,
    ALONE,
    BOTH,
    DEPTH,
    OTHERS,
    PART,
    REFERENCE,
    WEIGHTS,
    WHOLE,
)
from qvlm.tables.sensitivity.rows import KEYS

HEAD = """\
# Sensitivity: where does the loss come from?

Each model is quantized once. Then single parts of it are switched to floating point and back. The
loss is **KL**, the divergence of the next-token distribution from full precision in nats per token,
on the expected answers of questions or on plain text. *alone* quantizes nothing but the part, and
*saved* is how much lower the KL of the whole model becomes if the part is left in floating point.
Both are needed: errors of parts do not add up. In parentheses are 95 % intervals, over the same
questions or documents in every state.

The parts of a decoder are named after what their linears read. The linears of experts are counted
there too."""

ANSWERS = """\
## Answers

*changed* is the share of answers that differ from those of full precision, in percent. *accuracy*
is the difference from full precision in points. Both are with the part quantized alone, and with
everything quantized but the part. There are fewer questions than above, so the intervals are
wider."""

TEXT = """\
## Perplexity

Of the models on plain text, with the part quantized alone, and with everything quantized but the
part."""

BY_DEPTH = """\
## By depth

Layers of the vision tower and of the decoder, counted from 0. A tower's last layer may cost nothing
because LLaVA reads the features of the one before."""

NOTES = (
    "Ranges and scales are those of the walk that quantized everything. A part that is quantized "
    "alone is not calibrated anew on inputs in floating point.",
    "Questions and documents are of the validation split by default, so that nothing is tuned on "
    "those of the test split.",
    "*nothing* is what the method makes of the float model before it rounds. A method that only "
    "rounds leaves it as it is.",
    "Each interval holds at 95 % by itself, and some of so many miss what they should hold.",
    "`make verify` makes this page again from its CSV. The CSV itself is a measurement.",
)

Rows = pd.DataFrame
_STATES = ((ALONE, BOTH), (ALONE, WEIGHTS), (ALONE, ACTIVATIONS))


def page(rows: Rows, command: str) -> str:
    """Returns the page.

    Args:
        rows: Rows with the columns of `rows.COLUMNS`.
        command: Command that regenerates a model's rows.
    """
    parts = [HEAD, _by_part(rows), "![Loss by part](sensitivity.png)", BY_DEPTH, _by_depth(rows)]
    if (rows["questions"] > 0).any():
        parts += [ANSWERS, _answers(rows)]
    if rows["perplexity"].notna().any():
        parts += [TEXT, _perplexity(rows)]
    parts += ["## How this was made", bullets([f"Command: `{command}`", *NOTES]), _measured(rows)]
    return "\n\n".join(parts) + "\n"


def estimate(row: Any, name: str, digits: int = 3) -> str:
    """Returns a measure with its interval, such as "0.012 (0.010 to 0.014)".

    Args:
        row: Row of the CSV, or None if there is no such state.
        name: Column of the measure.
        digits: Number of decimals.
    """
    if row is None or pd.isna(row[name]):
        return NONE
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    ends = "" if pd.isna(low) else f" ({_ends(name, low, high, digits)})"
    value = row[name]
    return (signed(value, digits) if name == "difference" else f"{value:.{digits}f}") + ends


def find(rows: Rows, part: str, quantized: str, operands: str = BOTH) -> Any:
    """Returns the row of a state of one model, or None if it was not measured."""
    own = rows[
        (rows["part"] == part) & (rows["quantized"] == quantized) & (rows["operands"] == operands)
    ]
    return own.iloc[0] if len(own) else None


def parts_of(rows: Rows, *levels: str) -> list[str]:
    """Returns the names of the parts of some levels, in the order of the rows."""
    return list(dict.fromkeys(rows[rows["level"].isin(levels)]["part"]))


def by_model(rows: Rows) -> list[tuple[str, Rows]]:
    """Returns the rows of each model with its method and bit widths as a title."""
    grouped = rows.groupby(["model", "method", "bits"], sort=False)
    return [(" ".join(map(str, names)), own) for names, own in grouped]


def _ends(name: str, low: float, high: float, digits: int) -> str:
    """Returns the ends of an interval, with signs if the measure is a difference of accuracies."""
    if name == "difference":
        return f"{signed(low, digits)} to {signed(high, digits)}"
    return f"{low:.{digits}f} to {high:.{digits}f}"


def _by_part(rows: Rows) -> str:
    header = ["model", "part", "linears", "alone", "its weights", "its activations", "saved"]
    lines = []
    for title, own in by_model(rows):
        for part in parts_of(own, WHOLE, PART):
            states = [find(own, part, *state) for state in _STATES]
            cells = [estimate(row, "kl", 4) for row in states]
            saved = estimate(find(own, part, OTHERS), "saved", 4)
            lines.append([title, part, str(states[0]["linears"]), *cells, saved])
    return table(header, lines, left=2)


def _by_depth(rows: Rows) -> str:
    lines = [
        [
            *(title, part, estimate(find(own, part, ALONE), "kl", 4)),
            estimate(find(own, part, OTHERS), "saved", 4),
        ]
        for title, own in by_model(rows)
        for part in parts_of(own, DEPTH)
    ]
    return table(["model", "layers", "alone", "saved"], lines, left=2)


def _answers(rows: Rows) -> str:
    header = ["model", "part", "alone: changed", "alone: accuracy"]
    header += ["all others: changed", "all others: accuracy"]
    lines = [
        [
            *(title, part),
            *(
                estimate(find(own, part, state), name, 1)
                for state in (ALONE, OTHERS)
                for name in ("changed", "difference")
            ),
        ]
        for title, own in by_model(rows[rows["questions"] > 0])
        for part in parts_of(own, WHOLE, PART)
    ]
    return table(header, lines, left=2)


def _perplexity(rows: Rows) -> str:
    lines = [
        [title, part, *(estimate(find(own, part, how), "perplexity", 2) for how in (ALONE, OTHERS))]
        for title, own in by_model(rows[rows["perplexity"].notna()])
        for part in parts_of(own, REFERENCE, WHOLE, PART)
    ]
    return table(["model", "part", "alone", "all others"], lines, left=2)


def _measured(rows: Rows) -> str:
    header = [*KEYS, "questions or documents", "tokens", "answered", "accuracy"]
    return table(header, [_facts(own) for _, own in by_model(rows)], left=len(KEYS))


def _facts(own: Rows) -> Sequence[str]:
    full = own.iloc[0]
    accuracy = NONE if pd.isna(full["accuracy"]) else f"{full['accuracy']:.1f}"
    counts = (str(full[name]) for name in ("clusters", "tokens", "questions"))
    return [*(str(full[key]) for key in KEYS), *counts, accuracy]

"""The part of README.md that shows Table 2: a pure function of `table2.csv`.

It stands between two comments of Markdown. `python -m qvlm verify --write` writes it anew.
"""

import io
import textwrap

import pandas as pd

from qvlm.bits import BitWidths
from qvlm.markdown import bullets, replaced, table
from qvlm.tables.labels import BASELINE, FP, bits_order
from qvlm.tables.report import signed

_SHOWN = ["model", "bits", "method", "accuracy"]

BEGIN, END = "<!-- from results/table2.csv -->", "<!-- to here -->"


def with_block(readme: str, csv: str) -> str | None:
    """Returns the text of README.md with its part on Table 2 made anew.

    Args:
        readme: Text of README.md.
        csv: Text of `table2.csv`.

    Returns:
        The text, or None if it has no such part.
    """
    return replaced(readme, BEGIN, END, block(csv))


def block(csv: str) -> str:
    """Returns the table of averages, their uncertainty, and what each method gives back.

    Methods that were not measured on every model and at all bit widths are left to the page.

    Args:
        csv: Text of `table2.csv`.
    """
    frame = pd.read_csv(io.StringIO(csv)).query("`class` == 'Avg'")
    quantized = frame[frame["bits"] != FP]
    columns: dict[tuple[str, str], dict[str, float]] = {}
    for model, bits, method, accuracy in quantized[_SHOWN].itertuples(index=False):
        columns.setdefault((model, bits), {})[method] = accuracy
    everywhere = set.intersection(*map(set, columns.values()))
    columns = {
        cell: {method: value for method, value in own.items() if method in everywhere}
        for cell, own in columns.items()
    }
    full: dict[str, float] = dict(frame[frame["bits"] == FP][["model", "accuracy"]].to_numpy())
    rows = [["full precision"]]
    shown: set[str] = set()
    for model, _ in columns:
        rows[0].append("" if model in shown or model not in full else f"{full[model]:.2f}")
        shown.add(model)
    for method in next(iter(columns.values())):
        rows.append([method, *(f"{own[method]:.2f}" for own in columns.values())])
    sides = (frame["accuracy"] - frame["ci_low"], frame["ci_high"] - frame["accuracy"])
    widest = max(side.max() for side in sides)
    sentence = (
        f"Each value has a 95 % interval of at most {widest:.1f} points to either side. Unparsable "
        f"answers count as\nwrong and are at most {frame['unparsable'].max():.2f} %."
    )
    header = ["method", *(f"{model} {bits}" for model, bits in columns)]
    given = _given_back(columns, full)
    return "\n\n".join([table(header, rows), sentence, *([bullets(given)] if given else [])])


def _given_back(
    columns: dict[tuple[str, str], dict[str, float]], full: dict[str, float]
) -> list[str]:
    """Returns a sentence per model: what each method gives back at the narrowest bit widths."""
    found = []
    for model in dict.fromkeys(model for model, _ in columns):
        bits = max((bits for other, bits in columns if other == model), key=_narrowness)
        own = dict(columns[model, bits])
        if BASELINE not in own or model not in full:
            continue
        base = own.pop(BASELINE)
        parts = [f"{method} {signed(value - base, 1)}" for method, value in own.items()]
        loss = full[model] - base
        sentence = f"{model}, {bits}: rounding to nearest loses {loss:.1f} points. Over that, "
        wrapped = textwrap.wrap(f"{sentence}{', '.join(parts)}.", 98, break_on_hyphens=False)
        found.append("\n  ".join(wrapped))
    return found


def _narrowness(bits: str) -> tuple[int, int]:
    weights, activations = bits.removeprefix("W").split("A")
    return bits_order(BitWidths(int(weights), int(activations)))

"""The rows of the CSV: every state of a model with its measures and their 95 % intervals.

All measures are paired: each state reads the same questions or documents as full precision does.
Intervals of means per token take questions or documents as clusters (`qvlm.evaluation.divergence`)
and are by Student's t.
"""

from collections.abc import Mapping, Sequence
from math import exp, isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import t as student

from qvlm.cell.identity import Cell
from qvlm.errors import RunError
from qvlm.evaluation.metrics import paired_difference, ratio, wilson
from qvlm.evaluation.text_metrics import CONFIDENCE
from qvlm.tables.sensitivity import NAME
from qvlm.tables.sensitivity.measure import Outcome
from qvlm.tables.sensitivity.parts import ALONE, BOTH, EVERYTHING, REFERENCE, Part, State

CSV = f"{NAME}.csv"
KEYS = ("model", "method", "bits", "data", "split")
_MEASURES = ("kl", "saved", "perplexity", "changed", "difference")
COLUMNS = (
    *KEYS,
    *("level", "part", "linears", "quantized", "operands", "clusters", "tokens"),
    *(f"{name}{end}" for name in _MEASURES for end in ("", "_low", "_high")),
    *("accuracy", "questions"),
)
FULL = Part("full precision", REFERENCE, frozenset())


def read(results: Path) -> pd.DataFrame | None:
    """Reads the rows of a results folder, or returns None if there are none.

    Raises:
        RunError: If the CSV has other columns.
    """
    file = results / CSV
    if not file.is_file():
        return None
    rows = pd.read_csv(file)
    if list(rows.columns) != list(COLUMNS):
        raise RunError(f"{file} does not have the columns that make {NAME} writes.")
    return rows


def rows_of(cell: Cell, full: Outcome, found: Mapping[State, Outcome]) -> pd.DataFrame:
    """Returns the rows of one model.

    Args:
        cell: Cell of the quantized model.
        full: Outcome of full precision.
        found: Outcome of each state.

    Returns:
        Rows with the columns `COLUMNS`, the first one for full precision. `kl` is in nats per
        token, and `saved` is how far it is below that of the whole model. `changed` is the share
        of answers in percent that differ from those of full precision, and `difference` the
        accuracy minus that of full precision in points. What was not measured is missing.
    """
    config = cell.config
    data = (config.model.name, config.method_name, config.bits.label, config.data.name)
    keys = dict(zip(KEYS, (*data, config.data.split), strict=True))
    (whole,) = (
        outcome
        for state, outcome in found.items()
        if (state.part.name, state.operands) == (EVERYTHING, BOTH)
    )
    states = {State(FULL, ALONE, BOTH, frozenset()): full, **found}
    rows = [
        keys
        | {"level": state.part.level, "part": state.part.name, "linears": len(state.part.layers)}
        | {"quantized": state.quantized, "operands": state.operands}
        | _of_tokens(outcome, whole)
        | _of_answers(outcome, full)
        for state, outcome in states.items()
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _of_tokens(outcome: Outcome, whole: Outcome) -> dict[str, Any]:
    tokens = outcome.tokens
    found: dict[str, float] = {"clusters": len(tokens), "tokens": sum(tokens)}
    found |= _named("kl", [max(end, 0.0) for end in _mean(outcome.nats, tokens)])
    found |= _named("saved", _mean(np.subtract(whole.nats, outcome.nats), tokens))
    if outcome.log_losses:
        ends = [exp(value) for value in _mean(outcome.log_losses, tokens)]
        found |= _named("perplexity", ends)
    return found


def _of_answers(outcome: Outcome, full: Outcome) -> dict[str, Any]:
    count = len(outcome.correct)
    if not count:
        return {"questions": 0}
    pairs = zip(outcome.predictions, full.predictions, strict=True)
    changed = sum(own != other for own, other in pairs)
    apart = paired_difference(outcome.correct, full.correct)
    ends = [100 * end for end in wilson(changed, count)]
    return {
        "questions": count,
        "accuracy": 100 * sum(outcome.correct) / count,
        **_named("changed", (100 * changed / count, *ends)),
        **_named("difference", (apart.difference, apart.low, apart.high)),
    }


def _mean(values: ArrayLike, tokens: Sequence[int]) -> tuple[float, float, float]:
    """The mean per token and its interval; that of a single cluster is NaN."""
    mean, error = ratio(values, tokens)
    if not isfinite(error):
        return mean, nan, nan
    reach = float(student.ppf((1 + CONFIDENCE) / 2, len(tokens) - 1)) * error
    return mean, mean - reach, mean + reach


def _named(name: str, ends: Sequence[float]) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))

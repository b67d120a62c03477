"""The measures of plain text with their intervals, from sums over documents.

Tokens of one document depend on each other, so intervals treat documents as clusters.
"""

from math import exp, isfinite
from typing import Any

import pandas as pd
from scipy.stats import t as student

from qvlm.evaluation.metrics import ratio

CONFIDENCE = 0.95


def summarize(documents: pd.DataFrame) -> dict[str, Any]:
    """Computes the measures of `evaluate_text` with their intervals.

    Args:
        documents: One row per document with its sums.

    Returns:
        `tokens`, `documents`, and for each measure a mapping with the keys `value`, `low` and
        `high`: `perplexity`; `kl` in nats per token; `agreement` in percent. Low and high end a
        95 % interval and are None with a single document. A measure without sums is None.
    """
    nll = _per_token(documents, "nll")
    assert nll is not None
    agreement = _per_token(documents, "agreement")
    return {
        "tokens": int(documents["tokens"].sum()),
        "documents": len(documents),
        "perplexity": {key: None if v is None else exp(v) for key, v in nll.items()},
        "kl": _per_token(documents, "kl"),
        "agreement": agreement
        and {key: None if v is None else 100 * v for key, v in agreement.items()},
    }


def _per_token(documents: pd.DataFrame, name: str) -> dict[str, float | None] | None:
    """The mean of a measure per token, with an interval by Student's t over the documents."""
    if name not in documents:
        return None
    mean, error = ratio(documents[name], documents["tokens"])
    if not isfinite(error):
        return {"value": mean, "low": None, "high": None}
    reach = float(student.ppf((1 + CONFIDENCE) / 2, len(documents) - 1)) * error
    return {"value": mean, "low": mean - reach, "high": mean + reach}

"""What both forms of Table 4 have in common: their columns, their spreads, the paper's rows."""

import statistics
from collections.abc import Sequence
from typing import Any

from qvlm.tables.published import label, published

COLUMNS = (
    *("model", "bits", "method", "device", "threads", "seconds_per_question", "vision_s"),
    *("prefill_s", "decode_s", "tokens_per_s", "peak_memory_gib", "weight_gib", "accuracy"),
    *("memory_ratio", "speed_ratio", "speed_ratio_low", "speed_ratio_high", "extrapolated"),
    *("paper_model", "paper_hours", "paper_memory_gib", "paper_accuracy"),
)


def median_and_range(ratios: Sequence[float]) -> str:
    """Returns the median of ratios, and the lowest and highest in parentheses."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def paper_columns(model: str | None, bits: str, method: str) -> dict[str, Any]:
    """Returns the paper's columns of a row.

    Args:
        model: Model of the paper, or None.
        bits: Label of the bit widths.
        method: Name of the method in the paper.

    Returns:
        The columns of `COLUMNS` that begin with "paper"; empty if the paper has no such row.
    """
    found = published("table4").query("model == @model and bits == @bits and method == @method")
    if model is None or found.empty:
        return {}
    (row,) = found.to_dict("records")
    return {
        "paper_model": label(model),
        "paper_hours": row["time_hours"],
        "paper_memory_gib": row["memory_gib"],
        "paper_accuracy": row["accuracy"],
    }

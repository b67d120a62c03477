"""What the two forms of Table 4 share: their columns and their spreads."""

import statistics
from collections.abc import Sequence

COLUMNS = (
    *("model", "bits", "method", "device", "threads", "seconds_per_question", "vision_s"),
    *("prefill_s", "decode_s", "tokens_per_s", "peak_memory_gib", "weight_gib", "accuracy"),
    *("memory_ratio", "speed_ratio", "speed_ratio_low", "speed_ratio_high", "extrapolated"),
    *("paper_model", "paper_hours", "paper_memory_gib", "paper_accuracy"),
)


def spread(ratios: Sequence[float]) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

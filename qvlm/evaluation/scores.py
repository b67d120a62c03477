"""The scores of lm-eval's tasks, as records hold them."""

from collections.abc import Iterator, Mapping
from math import nan
from typing import Any

Score = tuple[str, str, float, float | None]
"""Task or group, metric, value and standard error."""


def scores(results: Mapping[str, Any]) -> Iterator[Score]:
    """Yields task or group, metric, value and standard error of the results of a record.

    Args:
        results: Entry `results` of `evaluate_tasks`. A metric is followed by the name of its
            filter, where that is not "none". A value that a record holds as null was not finite.
    """
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, comma, chosen = key.partition(",")
            value = nan if value is None else value
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{chosen}")
            label = metric if chosen == "none" else f"{metric} ({chosen})"
            yield task, label, value, error if isinstance(error, int | float) else None

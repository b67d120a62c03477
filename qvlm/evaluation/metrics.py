"""Accuracy per class with its uncertainty, and tests of whether two methods differ.

The gains at stake are one or two points in 4,000 questions, which is less than the interval of
either accuracy. Both methods answer the same questions, so they are compared question by question:
an exact McNemar test says whether they differ, a paired interval says by how much, and Holm's
adjustment covers the methods of a table.

All formulas are closed forms in standard-library arithmetic. Nothing here knows of models or files.
Shares are in percent unless a docstring says otherwise.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

_Z = NormalDist().inv_cdf(0.975)


def _subject(name: str) -> Callable[[pd.DataFrame], pd.Series]:
    return lambda frame: frame["subject"] == name


def _grades(low: int, high: int) -> Callable[[pd.DataFrame], pd.Series]:
    """A grade that is not "grade" and a number belongs to no class."""

    def inside(grade: object) -> bool:
        number = re.fullmatch(r"grade([0-9]+)", grade) if isinstance(grade, str) else None
        return number is not None and low <= int(number[1]) <= high

    def members(frame: pd.DataFrame) -> pd.Series:
        return frame["grade"].isin([grade for grade in frame["grade"].unique() if inside(grade)])

    return members


# The paper's columns. TXT and IMG overlap. Subjects and grades each partition the questions.
CLASSES: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    "NAT": _subject("natural science"),
    "SOC": _subject("social science"),
    "LAN": _subject("language science"),
    "TXT": lambda frame: frame["has_text"],
    "IMG": lambda frame: frame["has_image"],
    "NO": lambda frame: ~frame["has_text"] & ~frame["has_image"],
    "G1-6": _grades(1, 6),
    "G7-12": _grades(7, 12),
    "Avg": lambda frame: pd.Series(True, index=frame.index),
}


def class_metrics(predictions: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Summarizes predictions per class, in the order of `CLASSES`.

    Returns:
        For each class the number of questions `n` and, in percent, `accuracy`, its Wilson 95 %
        interval `ci_low` and `ci_high`, and the share `unparsable` of answers that name no choice.
        All but `n` are None where `n` is 0.
    """
    scored = predictions[["correct", "prediction"]]
    return {name: _summary(scored[of(predictions)]) for name, of in CLASSES.items()}


def skill_metrics(predictions: pd.DataFrame) -> pd.DataFrame:
    """Summarizes predictions per skill: one row each, sorted by `subject` and `skill`."""
    rows = [
        {"subject": subject, "skill": skill, **_summary(frame)}
        for (subject, skill), frame in predictions.groupby(["subject", "skill"], sort=True)
    ]
    columns = ["subject", "skill", *_summary(predictions)]
    return pd.DataFrame(rows, columns=columns)


def _summary(frame: pd.DataFrame) -> dict[str, Any]:
    n = len(frame)
    if n == 0:
        return {"n": 0, **dict.fromkeys(("accuracy", "ci_low", "ci_high", "unparsable"))}
    correct = int(frame["correct"].sum())
    low, high = wilson(correct, n)
    return {
        "n": n,
        "accuracy": 100 * correct / n,
        "ci_low": 100 * low,
        "ci_high": 100 * high,
        "unparsable": 100 * int(frame["prediction"].isna().sum()) / n,
    }


def wilson(k: int, n: int) -> tuple[float, float]:
    """Returns the 95 % score interval of k successes in n trials, as shares in [0, 1].

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927:
    `(p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)`.

    Raises:
        ValueError: If not 0 <= k <= n, or n < 1.
    """
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"an interval needs 0 <= k <= n and n >= 1, got k={k}, n={n}")
    share, z2n = k / n, _Z * _Z / n
    center = share + z2n / 2
    half = sqrt(z2n * (share * (1 - share) + z2n / 4))
    low, high = (center - half) / (1 + z2n), (center + half) / (1 + z2n)
    return (0.0 if k == 0 else low, 1.0 if k == n else high)  # rounding would miss the ends


@dataclass(frozen=True)
class McNemar:
    """Result of an exact McNemar test.

    Attributes:
        only_a: Number of questions that only the first method answered correctly.
        only_b: Number of questions that only the second method answered correctly.
        p_value: Two-sided exact p-value.
    """

    only_a: int
    only_b: int
    p_value: float


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> McNemar:
    """Tests whether two methods are correct equally often on the same questions.

    Exact binomial test on the questions where they differ (Q. McNemar, 1947): twice the smaller
    tail of Binomial(only_a + only_b, 1/2), at most 1.

    Args:
        correct_a: Whether the first method answered each question correctly, [questions].
        correct_b: Whether the second method did, in the same order, [questions].

    Raises:
        ValueError: If the two differ in length, or are empty.
    """
    only_a, only_b, _ = _discordant(correct_a, correct_b)
    total = only_a + only_b
    tail = sum(comb(total, k) for k in range(min(only_a, only_b) + 1))
    return McNemar(only_a, only_b, min(1.0, 2 * tail / 2**total))


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of the first method minus that of the second, with a 95 % interval, in points."""

    difference: float
    low: float
    high: float


def paired_difference(
    correct_a: ArrayLike, correct_b: ArrayLike, comparisons: int = 1
) -> PairedDifference:
    """Returns by how many percentage points the first method is ahead of the second.

    The interval is Bonett and Price's adjusted Wald interval ("Adjusted Wald confidence interval
    for a difference of binomial proportions based on paired data", 2012). With
    `a = (only_a + 1) / (n + 2)` and `b = (only_b + 1) / (n + 2)` it is
    `a - b -+ z sqrt((a + b - (a - b)^2) / (n + 2))`, cut to [-100, 100]. Unlike the plain Wald
    interval it keeps its level when few or no questions differ, and it needs no iteration.
    `difference` itself is not adjusted.

    Args:
        correct_a: Whether the first method answered each question correctly, [questions].
        correct_b: Whether the second method did, in the same order, [questions].
        comparisons: Number of intervals that together keep the level of 95 % (Bonferroni).

    Raises:
        ValueError: If the two differ in length, or are empty.
    """
    only_a, only_b, n = _discordant(correct_a, correct_b)
    a, b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    z = NormalDist().inv_cdf(1 - 0.025 / comparisons)
    half = z * sqrt((a + b - (a - b) ** 2) / (n + 2))
    return PairedDifference(
        difference=100 * (only_a - only_b) / n,
        low=100 * max(-1.0, a - b - half),
        high=100 * min(1.0, a - b + half),
    )


def _discordant(correct_a: ArrayLike, correct_b: ArrayLike) -> tuple[int, int, int]:
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or a.size == 0:
        raise ValueError(
            "two methods are compared on the same questions, at least one, but there are answers "
            f"of shape {a.shape} and {b.shape}"
        )
    return int((a & ~b).sum()), int((b & ~a).sum()), a.size


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p-values that are tested together (S. Holm, 1979), in the order given.

    The i-th smallest of m values is multiplied by m - i + 1 and raised to at least those before it.
    Rejecting adjusted values of at most alpha bounds the chance of any false rejection by alpha.

    Raises:
        ValueError: If a value is not within [0, 1].
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if not 0 <= p_values[index] <= 1:
            raise ValueError(f"{p_values[index]} is not a p-value")
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def ratio(
    values: ArrayLike, sizes: ArrayLike, clusters: ArrayLike | None = None
) -> tuple[float, float]:
    """Returns the mean of what clusters of different sizes add up to, and its standard error.

    The mean is `sum(values) / sum(sizes)`. Its standard error is that of a ratio of totals of
    independently drawn clusters (W. G. Cochran, Sampling Techniques, 1977, section 2.11):
    `sqrt(k / (k - 1) * sum((values - mean * sizes)^2)) / sum(sizes)` over k clusters.

    Args:
        values: Sum over each passage, [passages].
        sizes: Number of tokens of each passage, [passages].
        clusters: Cluster of each passage, [passages]. None stands for one passage each.

    Returns:
        Mean and standard error. The error of a single cluster is infinite.
    """
    totals, counts = (np.asarray(array, dtype=np.float64) for array in (values, sizes))
    if clusters is not None:
        index = np.unique(np.asarray(clusters), return_inverse=True)[1]
        totals = np.bincount(index, weights=totals).astype(np.float64)
        counts = np.bincount(index, weights=counts).astype(np.float64)
    mean = float(totals.sum() / counts.sum())
    if len(totals) < 2:
        return mean, float("inf")
    spread = float(((totals - mean * counts) ** 2).sum()) * len(totals) / (len(totals) - 1)
    return mean, sqrt(spread) / float(counts.sum())

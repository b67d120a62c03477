"""How sure a difference of two methods is over questions, calibration draws and trainings.

Two methods answer the same questions after each training of the model and each draw of the
calibration problems. The difference of their answers to question q is, in points,

    y[t, d, q] = mean + training[t] + draw[d] + question[q] + their interactions + rest

with all effects drawn at random: the crossed random-effects model of generalizability theory and of
studies with several readers and cases. The variance of the mean follows from the mean squares of
the margins (R. L. Brennan, Generalizability Theory, 2001, chapter 6):

    V = T + D + max(Q - TQ - DQ + TDQ, 0)

where T is the variance of the trainings' means over their number, which holds the interactions with
trainings already, TQ that of an interaction, and so on. The interaction TD is in both T and D; it
is not taken off once, which errs on the careful side. The degrees of freedom of V are
Satterthwaite's, and intervals are Student's.

Three trainings alone say little about how far trainings differ. All claims say more: T / TQ, how
much more trainings differ than the questions alone would make them, is taken to be alike across
claims, and each claim's ratio is drawn towards the common one as limma does it for genes (G. K.
Smyth, "Linear models and empirical Bayes methods", 2004): the ratios follow a scaled inverse
chi-square distribution, which is fitted to all of them and adds its degrees of freedom. The same
holds for draws, D / DQ.

With one training nothing can be said about other trainings, and the interval covers questions and
draws only; with one draw it covers no other draws.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isfinite, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

# Prior degrees of freedom from which the ratios of all claims count as equal.
MOST = 1e6


@dataclass(frozen=True)
class Spread:
    """Mean difference of two methods, and what each source adds to the variance of that mean.

    Attributes:
        mean: Mean over trainings, draws and questions, in points.
        shape: Number of trainings, draws and questions.
        parts: Mean squares over the number of all answers, in points squared, by the initials of
            the sources: "T", "D", "Q", "TD", "TQ", "DQ" and "TDQ". 0 where a source has one member.
    """

    mean: float
    shape: tuple[int, int, int]
    parts: dict[str, float]

    @classmethod
    def of(cls, differences: NDArray[np.float64]) -> "Spread":
        """Takes differences apart.

        Args:
            differences: Differences in points, [trainings, draws, questions].
        """
        names = "TDQ"
        size = differences.size
        effects: dict[str, NDArray[np.float64]] = {"": differences.mean(keepdims=True)}
        parts = {}
        for name in ("T", "D", "Q", "TD", "TQ", "DQ", "TDQ"):
            others = tuple(axis for axis in range(3) if names[axis] not in name)
            effect = differences.mean(axis=others, keepdims=True)
            for lower, known in effects.items():
                if set(lower) < set(name):
                    effect = effect - known
            effects[name] = effect
            freedom = _freedom(name, differences.shape)
            repeats = size / effect.size
            total = float((effect**2).sum()) * repeats
            parts[name] = total / freedom / size if freedom else 0.0
        # Methods that never differ may differ on the next question.
        parts["Q"] = max(parts["Q"], (100 / differences.shape[2]) ** 2)
        return cls(float(effects[""].item()), differences.shape, parts)

    def ratio(self, source: str) -> float | None:
        """Returns T / TQ or D / DQ, or None where that says nothing.

        Args:
            source: "T" or "D".
        """
        below = self.parts[f"{source}Q"]
        return self.parts[source] / below if self.parts[source] > 0 and below > 0 else None


@dataclass(frozen=True)
class Prior:
    """What the claims together say about the ratio T / TQ or D / DQ.

    Attributes:
        ratio: Common ratio.
        freedom: Degrees of freedom that it stands for; 0 leaves each claim to itself.
        most: Degrees of freedom of all claims together, which no claim's exceed.
    """

    ratio: float = 1.0
    freedom: float = 0.0
    most: float = float("inf")

    @classmethod
    def fit(cls, ratios: Sequence[float], freedom: int, likeness: float = 0.0) -> "Prior":
        """Fits the distribution of the true ratios (Smyth 2004, section 6.2).

        Claims that share a method have ratios alike by chance. They vary less than independent ones
        would, and count as fewer.

        Args:
            ratios: Measured ratio of each claim.
            freedom: Degrees of freedom of each of them.
            likeness: Mean correlation of the ratios of two claims; see `likeness_of`.

        Returns:
            The prior; with fewer than three ratios one that adds nothing.
        """
        if len(ratios) < 3 or freedom < 1:
            return cls()
        most = freedom * len(ratios) / (1 + likeness * (len(ratios) - 1))
        logs = np.log(ratios) - special.digamma(freedom / 2) + np.log(freedom / 2)
        excess = float(np.var(logs, ddof=1) / (1 - likeness) - special.polygamma(1, freedom / 2))
        if excess <= special.polygamma(1, MOST / 2):
            return cls(float(np.mean(ratios)), MOST, most)
        half = optimize.brentq(lambda x: special.polygamma(1, x) - excess, 1e-6, MOST)
        ratio = float(np.exp(np.mean(logs) + special.digamma(half) - np.log(half)))
        return cls(ratio, 2 * half, most)

    def moderate(self, part: float, below: float, freedom: int) -> tuple[float, float]:
        """Draws a mean square towards the common ratio.

        Args:
            part: T or D of a claim.
            below: TQ or DQ of that claim.
            freedom: Degrees of freedom of `part`.

        Returns:
            The moderated mean square, and its degrees of freedom.
        """
        total = self.freedom + freedom
        value = (self.freedom * self.ratio * below + freedom * part) / total
        return value, min(total, max(self.most, freedom))


@dataclass(frozen=True)
class Estimate:
    """A difference with its interval.

    Attributes:
        mean: Difference in points.
        low, high: Ends of the interval.
        freedom: Degrees of freedom of its variance.
        errors: What trainings, draws and questions add to the standard error, in points: the square
            roots of the three terms of V, by "T", "D" and "Q".
    """

    mean: float
    low: float
    high: float
    freedom: float
    errors: dict[str, float]


def likeness_of(pairs: Sequence[tuple[Hashable, Hashable]]) -> float:
    """Returns the mean correlation of the variances of two different claims, from 0 to 1.

    Two differences a - b and c - d of independent methods of equal variance correlate by half for
    each shared method, and their variances by the square of that.

    Args:
        pairs: The two methods of each claim. Methods on different models are different.
    """
    found = [
        (((a == c) - (a == d) - (b == c) + (b == d)) / 2) ** 2
        for (a, b), (c, d) in combinations(pairs, 2)
    ]
    return min(sum(found) / len(found), 0.99) if found else 0.0


def priors_of(spreads: Sequence[Spread], likeness: float = 0.0) -> dict[str, Prior]:
    """Fits the priors of trainings, "T", and of draws, "D", to all claims."""
    priors = {}
    for source, axis in (("T", 0), ("D", 1)):
        ratios: dict[int, list[float]] = {}
        for spread in spreads:
            ratio = spread.ratio(source)
            if ratio is not None:
                ratios.setdefault(spread.shape[axis] - 1, []).append(ratio)
        freedom = max(ratios, key=lambda key: len(ratios[key]), default=0)
        priors[source] = Prior.fit(ratios.get(freedom, []), freedom, likeness)
    return priors


def estimate(spread: Spread, priors: dict[str, Prior], comparisons: int = 1) -> Estimate:
    """Returns the difference with its 95 % interval.

    Args:
        spread: Difference taken apart.
        priors: Priors of "T" and "D"; see `priors_of`.
        comparisons: Number of intervals that together keep the level of 95 % (Bonferroni).
    """
    parts = spread.parts
    terms = {"T": 0.0, "D": 0.0}
    doubt = 0.0  # the sum of squared terms over their degrees of freedom
    for axis, source in enumerate(terms):
        freedom = spread.shape[axis] - 1
        if freedom > 0 and parts[source] > 0:
            below = parts[f"{source}Q"]
            terms[source], known = priors[source].moderate(parts[source], below, freedom)
            doubt += terms[source] ** 2 / known
    questions = parts["Q"] - parts["TQ"] - parts["DQ"] + parts["TDQ"]
    # Without other sources the questions are counted whole.
    terms["Q"] = max(questions, 0.0) if terms["T"] or terms["D"] else parts["Q"]
    doubt += parts["Q"] ** 2 / max(spread.shape[2] - 1, 1)
    variance = sum(terms.values())
    known = max(variance**2 / doubt, 1.0)
    quantile = float(stats.t.ppf(1 - 0.025 / comparisons, known))
    half = quantile * sqrt(variance)
    assert isfinite(half)
    errors = {source: sqrt(term) for source, term in terms.items()}
    return Estimate(spread.mean, spread.mean - half, spread.mean + half, known, errors)


def _freedom(name: str, shape: Sequence[int]) -> int:
    """The degrees of freedom of an effect or an interaction."""
    product = 1
    for source, size in zip("TDQ", shape, strict=True):
        product *= size - 1 if source in name else 1
    return product

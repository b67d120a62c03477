"""The verdicts: what the records say about the paper's claims, and what quantization cost.

Each verdict is a sentence with its interval and the least effect that the questions could have
shown. An interval covers the questions that were asked, not the draw of the calibration problems.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np

from qvlm.evaluation.metrics import PairedDifference, paired_difference
from qvlm.records.record import Record
from qvlm.report.content import Content
from qvlm.tables.claims import CLAIMS
from qvlm.tables.comparison import drop, paired
from qvlm.tables.report import signed

POWER = 0.8
HOLDS, OPPOSITE, UNDECIDED, MISSING = "holds", "the opposite", "undecided", "not measured"


@dataclass(frozen=True)
class Verdict:
    """A sentence on one comparison.

    Attributes:
        outcome: "holds", "the opposite", "undecided" or "not measured".
        claim: What is claimed, in words.
        sentence: What was found, with interval and least effect.
        runs: Numbers of the records that were compared.
    """

    outcome: str
    claim: str
    sentence: str
    runs: tuple[int, ...] = ()


def claims(content: Content) -> list[Verdict]:
    """Returns a verdict per claim of `qvlm.tables.claims` and model; those not measured last.

    The intervals of all claims and models hold together (Bonferroni).
    """
    by_cell = {(r.model, r.bits, r.method): r for r in _claimed(content)}
    models = sorted({model for model, _, _ in by_cell})
    found = []
    for claim in CLAIMS:
        for model in models:
            pair = [by_cell.get((model, claim.bits, name)) for name in (claim.first, claim.second)]
            text = f"{claim.text} at {claim.bits}, {model}"
            answers = paired(pair[0], pair[1]) if pair[0] and pair[1] else None
            if answers is None or pair[0] is None or pair[1] is None:
                absent = [
                    n for n, r in zip((claim.first, claim.second), pair, strict=True) if not r
                ]
                why = f"no record of {' and '.join(absent)}" if absent else "other questions"
                found.append(Verdict(MISSING, text, f"Not measured: {why}."))
                continue
            count = len(CLAIMS) * len(models)
            difference = paired_difference(*answers, count)
            runs = tuple(content.numbers[record.name] for record in pair if record)
            printed = "" if claim.points is None else f" The paper has {claim.points:+.1f}."
            least = least_effect(float(np.mean(answers[0] != answers[1])), len(answers[0]), count)
            sentence = f"{_points(difference)}{printed} {_least(least)}"
            found.append(Verdict(_outcome(difference), text, sentence, runs))
    return sorted(found, key=lambda verdict: verdict.outcome == MISSING)


def costs(content: Content) -> list[Verdict]:
    """Returns a sentence per quantized record: what its bits cost against full precision."""
    found = []
    for record in content.whole.shown:
        reference = content.reference(record)
        if record.bit_widths.is_full_precision:
            continue
        text = f"{record.method} at {record.bits}, {record.model}"
        runs = (content.numbers[record.name],)
        fall = drop(record, reference)
        if reference is None or fall is None:
            found.append(Verdict(MISSING, text, "Full precision was not asked this.", runs))
            continue
        answers = paired(record, reference)
        assert answers is not None  # `drop` compared them
        least = least_effect(float(np.mean(answers[0] != answers[1])), len(answers[0]))
        runs = (*runs, content.numbers[reference.name])
        word = "loses" if fall.high < 0 else "gains" if fall.low > 0 else "no loss seen"
        found.append(Verdict(word, text, f"{_points(fall)} {_least(least)}", runs))
    return found


def least_effect(disagreement: float, questions: int, comparisons: int = 1) -> float:
    """Returns the least paired difference, in points, that shows with 80 % power at 5 %.

    It is `(z_(1 - 0.025/m) + z_0.8) sqrt(d / n)`, the normal approximation of McNemar's test for m
    comparisons, n questions and a share d of questions on which the two methods differ (J. E.
    Miettinen, "The matched pairs design in the case of all-or-none responses", 1968, first order).

    Args:
        disagreement: Share of questions on which only one of the two is right, in [0, 1].
        questions: Number of questions.
        comparisons: Number of comparisons that share the level of 5 %.
    """
    normal = NormalDist()
    factor = normal.inv_cdf(1 - 0.025 / comparisons) + normal.inv_cdf(POWER)
    return 100 * factor * sqrt(max(disagreement, 1 / questions) / questions)


def _claimed(content: Content) -> Sequence[Record]:
    shown = list(content.whole.shown)
    for selection in content.parts.values():
        shown += selection.shown
    return shown


def _outcome(difference: PairedDifference) -> str:
    return HOLDS if difference.low > 0 else OPPOSITE if difference.high < 0 else UNDECIDED


def _points(found: PairedDifference) -> str:
    ends = f"{signed(found.low)} to {signed(found.high)}"
    return f"{signed(found.difference)} points (95 % interval {ends})."


def _least(points: float) -> str:
    return f"The least difference that could have been seen is {points:.2f} points."

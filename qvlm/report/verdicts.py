"""The verdicts: what the records say about the paper's claims, and what quantization cost.

Each verdict is a sentence with its interval and the least effect that could have been seen.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf, sqrt
from statistics import NormalDist

import numpy as np

from qvlm.evaluation.metrics import paired_difference
from qvlm.records.record import Record
from qvlm.report.content import Content
from qvlm.tables.claims import CLAIMS, Claim, verdict
from qvlm.tables.claims.components import Estimate
from qvlm.tables.comparison import drop, paired
from qvlm.tables.report import signed

POWER = 0.8
MISSING = "not measured"


@dataclass(frozen=True)
class Verdict:
    """A sentence on one comparison.

    Attributes:
        outcome: "holds", "refuted", "undecided" or "not measured"; of a cost "loses", "gains" or
            "no loss seen".
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

    Claims that the design of `make claims` measured have its intervals, over questions, draws and
    trainings. Others are read off the records of the tables, whose intervals cover questions only.
    The intervals of all claims and models hold together (Bonferroni).
    """
    by_cell = {(r.model, r.bits, r.method): r for r in _of_tables(content)}
    models = sorted({*(model for model, _, _ in by_cell), *(m for _, m in content.claims.spreads)})
    found = [
        _designed(claim, model, content)
        if (claim, model) in content.claims.spreads
        else _of_records(claim, model, by_cell, len(CLAIMS) * len(models), content)
        for claim in CLAIMS
        for model in models
    ]
    return sorted(found, key=lambda verdict: verdict.outcome == MISSING)


def _designed(claim: Claim, model: str, content: Content) -> Verdict:
    """Returns the verdict of the design."""
    made = content.claims
    own = made.estimates[claim, model]
    trainings, draws, questions = made.spreads[claim, model].shape
    least = f"{made.visible(claim, model):.2f}"
    sentence = (
        f"{_points(own.mean, own.low, own.high)}{_printed(claim)} Over {questions} questions, "
        f"{draws} draws and {trainings} trainings; the least difference that could have been seen "
        f"is {least} points."
    )
    runs = tuple(content.numbers[record.name] for record in content.first_pair(claim, model))
    return _verdict(claim, model, own, sentence, runs)


def _of_records(
    claim: Claim,
    model: str,
    by_cell: Mapping[tuple[str, str, str], Record],
    comparisons: int,
    content: Content,
) -> Verdict:
    """Returns the verdict of one pair of records, or says which of them there is not."""
    names = (claim.first, claim.second)
    first, second = (by_cell.get((model, claim.bits, name)) for name in names)
    if first is None or second is None:
        absent = [n for n, r in zip(names, (first, second), strict=True) if r is None]
        text = f"Not measured: no record of {' and '.join(absent)}."
        return Verdict(MISSING, _title(claim, model), text)
    runs = (content.numbers[first.name], content.numbers[second.name])
    answers = paired(first, second)
    if answers is None:
        text = "Not measured: the two were not asked the same questions."
        return Verdict(MISSING, _title(claim, model), text, runs)
    seen = paired_difference(*answers, comparisons)
    own = Estimate(seen.difference, seen.low, seen.high, inf, {})
    disagreement, count = float(np.mean(answers[0] != answers[1])), len(answers[0])
    sentence = (
        f"{_points(own.mean, own.low, own.high)}{_printed(claim)} Over {count} questions and no "
        "other draws or trainings; the least difference that could have been seen is "
        f"{least_effect(disagreement, count, comparisons):.2f} points."
    )
    return _verdict(claim, model, own, sentence, runs)


def _verdict(
    claim: Claim, model: str, own: Estimate, sentence: str, runs: tuple[int, ...]
) -> Verdict:
    outcome, _, detail = verdict(own, claim.points).partition(": ")
    outcome, _, smaller = outcome.partition(", ")
    detail = detail or smaller
    more = f" {detail[0].upper()}{detail[1:]}." if detail else ""
    return Verdict(outcome, _title(claim, model), sentence + more, runs)


def _title(claim: Claim, model: str) -> str:
    return f"{claim.text} at {claim.bits}, {model}"


def _printed(claim: Claim) -> str:
    return "" if claim.points is None else f" The paper has {claim.points:+.1f}."


def costs(content: Content) -> list[Verdict]:
    """Returns a sentence per quantized record: what its bits cost against full precision."""
    found = []
    for record in content.whole.shown:
        reference = content.reference(record)
        if record.bit_widths.is_full_precision:
            continue
        text = f"{record.method} at {record.bits}, {record.model}"
        runs: tuple[int, ...] = (content.numbers[record.name],)
        fall = drop(record, reference)
        if reference is None or fall is None:
            found.append(Verdict(MISSING, text, "Full precision was not asked this.", runs))
            continue
        answers = paired(record, reference)
        assert answers is not None  # `drop` compared them
        least = least_effect(float(np.mean(answers[0] != answers[1])), len(answers[0]))
        runs = (*runs, content.numbers[reference.name])
        word = "loses" if fall.high < 0 else "gains" if fall.low > 0 else "no loss seen"
        seen = f"The least difference that could have been seen is {least:.2f} points."
        points = _points(fall.difference, fall.low, fall.high)
        found.append(Verdict(word, text, f"{points} {seen}", runs))
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


def _of_tables(content: Content) -> Iterator[Record]:
    for selection in (content.whole, *content.parts.values()):
        yield from selection.shown


def _points(mean: float, low: float, high: float) -> str:
    return f"{signed(mean)} points (95 % interval {signed(low)} to {signed(high)})."

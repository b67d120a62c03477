"""Verdicts follow from paired intervals, and say what the questions could have shown."""

from pathlib import Path

import numpy as np
import pytest

from qvlm.evaluation.metrics import mcnemar
from qvlm.report.content import Content
from qvlm.report.verdicts import claims, costs, least_effect
from qvlm.tables.claims import CLAIMS
from tests.helpers.records import make_record


@pytest.mark.parametrize(
    ("questions", "comparisons", "points"),
    [(4000, 1, 1.72), (4000, 11, 2.25), (20_000, 1, 0.77), (20_000, 11, 1.01), (40_000, 1, 0.54)],
)
def test_the_least_effect_of_known_designs(questions: int, comparisons: int, points: float) -> None:
    assert least_effect(0.15, questions, comparisons) == pytest.approx(points, abs=0.006)


def test_the_least_effect_is_seen_in_four_of_five_experiments() -> None:
    """Draws experiments in which the true difference is the least effect, and counts detections."""
    random = np.random.default_rng(0)
    questions, disagreement = 2000, 0.15
    share = least_effect(disagreement, questions) / 100
    both = [(disagreement + share) / 2, (disagreement - share) / 2, 1 - disagreement]
    seen = 0
    for _ in range(400):
        a, b, _ = random.multinomial(questions, both)
        right_a = np.repeat([True, False, True], [a, b, questions - a - b])
        right_b = np.repeat([False, True, True], [a, b, questions - a - b])
        seen += mcnemar(right_a, right_b).p_value < 0.05
    assert 0.72 < seen / 400 < 0.86


def test_claims_hold_are_opposite_undecided_or_not_measured(tmp_path: Path) -> None:
    records = [
        make_record(tmp_path, method, bits, accuracy=accuracy, n=400, seed=seed)
        for method, bits, accuracy, seed in [
            ("x", "FP", 90, 0),
            ("Q-VLM", "W4A4", 88, 1),
            ("AWQ", "W4A4", 55, 2),
            ("QLoRA", "W4A4", 88, 3),
            ("Layer-wise", "W4A4", 40, 4),
            ("RTN", "W4A4", 70, 5),
        ]
    ]
    content = Content.of(records)
    found = {v.claim.partition(" (")[0] + v.claim[-18:]: v for v in claims(content)}
    assert len(claims(content)) == len(CLAIMS)
    outcomes = {
        claim.partition(" at ")[0].partition(" (")[0]: verdict.outcome
        for claim, verdict in ((v.claim, v) for v in claims(content))
        if "W4A4" in claim
    }
    assert outcomes["Q-VLM beats AWQ"] == "holds"
    assert outcomes["QLoRA beats AWQ"] == "holds"
    assert outcomes["Q-VLM beats QLoRA"] == "undecided"
    assert outcomes["Layer-wise search helps"] == "the opposite"
    assert outcomes["CDM helps"] == "not measured"
    assert found
    missing = next(v for v in claims(content) if v.claim.startswith("CDM helps"))
    assert missing.sentence == "Not measured: no record of Q-VLM, CDM only."
    measured = next(v for v in claims(content) if v.claim.startswith("Q-VLM beats AWQ") and v.runs)
    assert "The paper has +2.9." in measured.sentence
    assert "could have been seen is" in measured.sentence
    names = {content.numbers[record.name]: record.method for record in records}
    assert [names[run] for run in measured.runs] == ["Q-VLM", "AWQ"]


def test_costs_say_what_was_lost(tmp_path: Path) -> None:
    full = make_record(tmp_path, bits="FP", accuracy=90, n=400)
    low = make_record(tmp_path, "RTN", accuracy=50, n=400, seed=1)
    (verdict,) = costs(Content.of([full, low]))
    assert verdict.outcome == "loses"
    lost = low.predictions["correct"].mean() - full.predictions["correct"].mean()
    assert verdict.sentence.startswith(f"{100 * lost:.2f} points")
    (alone,) = costs(Content.of([low]))
    assert alone.outcome == "not measured"

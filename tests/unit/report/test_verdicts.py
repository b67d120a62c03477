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


def test_claims_hold_are_refuted_undecided_or_not_measured(tmp_path: Path) -> None:
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
    assert len(claims(content)) == len(CLAIMS)
    outcomes = {
        verdict.claim.partition(" at ")[0].partition(" (")[0]: verdict.outcome
        for verdict in claims(content)
        if "W4A4" in verdict.claim
    }
    assert outcomes["Q-VLM beats AWQ"] == "holds"
    assert outcomes["QLoRA beats AWQ"] == "holds"
    assert outcomes["Q-VLM beats QLoRA"] == "undecided"
    assert outcomes["Layer-wise search helps"] == "refuted"
    assert outcomes["CDM helps"] == "not measured"
    missing = next(v for v in claims(content) if v.claim.startswith("CDM helps"))
    assert missing.sentence == "Not measured: no record of Q-VLM, CDM only."
    measured = next(v for v in claims(content) if v.claim.startswith("Q-VLM beats AWQ") and v.runs)
    assert "The paper has +2.9." in measured.sentence
    assert "could have been seen is" in measured.sentence
    names = {content.numbers[record.name]: record.method for record in records}
    assert [names[run] for run in measured.runs] == ["Q-VLM", "AWQ"]


def test_the_design_of_the_claims_comes_first(tmp_path: Path) -> None:
    """Two draws and two trainings of a pair, beside a pair of Table 2 that says the opposite."""
    table = [
        make_record(tmp_path, "AWQ", accuracy=90, n=300, seed=1),
        make_record(tmp_path, "QLoRA", accuracy=50, n=300, seed=2),
    ]
    designed = [
        make_record(
            tmp_path,
            method,
            model=model,
            accuracy=accuracy,
            n=500,
            seed=seed,
            name=f"{model}-{method}-{draw}",
            group="claims",
            calibration={"split": "train", "samples": 3, "seed": draw},
        )
        for seed, (method, accuracy) in enumerate([("QLoRA", 90), ("AWQ", 50)])
        for draw in (0, 1)
        for model in ("mini_llava", "mini_llava-seed1")
    ]
    content = Content.of([*table, *designed])
    found = next(v for v in claims(content) if v.claim.startswith("QLoRA beats AWQ"))
    assert found.outcome == "holds"
    assert "Over 500 questions, 2 draws and 2 trainings" in found.sentence
    behind = [content.every[run].name for run in found.runs]
    assert behind == ["mini_llava-QLoRA-0", "mini_llava-AWQ-0"]
    assert [record.name for record in content.records] == [record.name for record in table]


def test_costs_say_what_was_lost(tmp_path: Path) -> None:
    full = make_record(tmp_path, bits="FP", accuracy=90, n=400)
    low = make_record(tmp_path, "RTN", accuracy=50, n=400, seed=1)
    (verdict,) = costs(Content.of([full, low]))
    assert verdict.outcome == "loses"
    lost = low.predictions["correct"].mean() - full.predictions["correct"].mean()
    assert verdict.sentence.startswith(f"{100 * lost:.2f} points")
    (alone,) = costs(Content.of([low]))
    assert alone.outcome == "not measured"

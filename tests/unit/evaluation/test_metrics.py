"""Class metrics and statistics against independent computations (scipy, loops, simulation)."""

import math
import random
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from qvlm.evaluation.metrics import (
    CLASSES,
    class_metrics,
    holm,
    mcnemar,
    paired_difference,
    skill_metrics,
    wilson,
)

SUBJECTS = {"NAT": "natural science", "SOC": "social science", "LAN": "language science"}


def make_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        prediction = rng.choice([None, 0, 1, 2])
        answer = rng.randrange(3)
        rows.append(
            {
                "question_id": f"test-{index}",
                "subject": rng.choice(list(SUBJECTS.values())),
                "grade": f"grade{rng.randint(1, 12)}",
                "skill": rng.choice(["magnets", "maps", "rhymes"]),
                "has_image": rng.random() < 0.5,
                "has_text": rng.random() < 0.5,
                "n_choices": 3,
                "answer": answer,
                "prediction": prediction,
                "correct": prediction == answer,
                "text": "",
            }
        )
    return rows


def make_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows).astype({"prediction": "Int64"})


def belongs(row: dict[str, Any], name: str) -> bool:
    """The paper's classes, one row at a time."""
    grade = int(row["grade"][5:])
    if name in SUBJECTS:
        return row["subject"] == SUBJECTS[name]
    return {
        "TXT": row["has_text"],
        "IMG": row["has_image"],
        "NO": not (row["has_text"] or row["has_image"]),
        "G1-6": grade <= 6,
        "G7-12": grade >= 7,
        "Avg": True,
    }[name]


@pytest.mark.parametrize("dtype", ["object", "str", "string"])
def test_members_of_a_class_are_plain_booleans_whatever_the_strings(dtype: str) -> None:
    frame = make_frame(make_rows(3)).assign(grade=pd.Series(["grade6", "", "grade12"], dtype=dtype))
    members = {name: of(frame) for name, of in CLASSES.items()}
    assert all(mask.dtype == bool for mask in members.values())
    assert members["G1-6"].tolist() == [True, False, False]
    assert members["G7-12"].tolist() == [False, False, True]


def test_every_class_counts_its_own_questions() -> None:
    rows = make_rows(500)
    metrics = class_metrics(make_frame(rows))
    assert list(metrics) == ["NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg"]
    for name, got in metrics.items():
        members = [row for row in rows if belongs(row, name)]
        right = sum(row["correct"] for row in members)
        interval = binomtest(right, len(members)).proportion_ci(method="wilson")
        assert got == {
            "n": len(members),
            "accuracy": pytest.approx(100 * right / len(members)),
            "ci_low": pytest.approx(100 * interval.low),
            "ci_high": pytest.approx(100 * interval.high),
            "unparsable": pytest.approx(
                100 * sum(row["prediction"] is None for row in members) / len(members)
            ),
        }


def test_partitions_add_up_and_text_and_image_overlap() -> None:
    metrics = class_metrics(make_frame(make_rows(500)))
    n = {name: metrics[name]["n"] for name in metrics}
    assert n["NAT"] + n["SOC"] + n["LAN"] == n["G1-6"] + n["G7-12"] == n["Avg"] == 500
    assert n["TXT"] + n["IMG"] + n["NO"] > 500


def test_a_class_without_questions_has_no_accuracy() -> None:
    rows = [row for row in make_rows(200) if row["subject"] != SUBJECTS["SOC"]]
    empty = class_metrics(make_frame(rows))["SOC"]
    assert empty == {
        "n": 0,
        "accuracy": None,
        "ci_low": None,
        "ci_high": None,
        "unparsable": None,
    }


def test_numbers_are_plain_so_that_json_takes_them() -> None:
    for values in class_metrics(make_frame(make_rows(50))).values():
        assert {type(value) for value in values.values()} <= {int, float}


def test_skills_are_summarized_one_by_one() -> None:
    rows = make_rows(300)
    table = skill_metrics(make_frame(rows))
    assert table["n"].sum() == 300
    assert table[["subject", "skill"]].equals(
        table[["subject", "skill"]].sort_values(["subject", "skill"], ignore_index=True)
    )
    for got in table.itertuples():
        members = [r for r in rows if (r["subject"], r["skill"]) == (got.subject, got.skill)]
        assert got.n == len(members)
        assert got.accuracy == pytest.approx(100 * np.mean([r["correct"] for r in members]))
        assert got.ci_low < got.accuracy < got.ci_high


@pytest.mark.parametrize("n", [1, 2, 7, 100, 4241])
def test_wilson_equals_scipy(n: int) -> None:
    for k in sorted({0, 1, n // 3, n // 2, n - 1, n}):
        expected = binomtest(k, n).proportion_ci(confidence_level=0.95, method="wilson")
        assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_mirrors(trial: tuple[int, int]) -> None:
    k, n = trial
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    mirrored = wilson(n - k, n)
    assert (1 - high, 1 - low) == pytest.approx(mirrored, abs=1e-12)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(k: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"k={k}, n={n}"):
        wilson(k, n)


def pair(only_a: int, only_b: int, both: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Answers of two methods with the given table, shuffled together."""
    cells = [(1, 0)] * only_a + [(0, 1)] * only_b + [(1, 1)] * both + [(0, 0)] * neither
    random.Random(0).shuffle(cells)
    return [bool(a) for a, _ in cells], [bool(b) for _, b in cells]


@pytest.mark.parametrize(
    ("only_a", "only_b"), [(0, 0), (0, 1), (0, 9), (5, 5), (3, 12), (40, 61), (310, 402)]
)
def test_mcnemar_is_the_binomial_test_on_differing_questions(only_a: int, only_b: int) -> None:
    a, b = pair(only_a, only_b, both=50, neither=20)
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    got = mcnemar(a, b)
    assert (got.only_a, got.only_b) == (only_a, only_b)
    assert got.p_value == pytest.approx(expected, rel=1e-9)
    assert mcnemar(b, a).p_value == got.p_value


def test_mcnemar_takes_columns_and_ignores_their_index() -> None:
    a, b = pair(3, 12, both=5, neither=5)
    columns = pd.Series(a), pd.Series(b, index=range(len(b), 0, -1))
    assert mcnemar(*columns) == mcnemar(a, b)


def test_mcnemar_stays_exact_at_thousands_of_differences() -> None:
    a, b = pair(2100, 1900, both=0, neither=0)
    expected = binomtest(1900, 4000).pvalue
    assert mcnemar(a, b).p_value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("compare", [mcnemar, paired_difference])
@pytest.mark.parametrize("answers", [([], []), ([True], [True, False]), ([[True]], [[True]])])
def test_unpaired_answers_are_refused(compare: Any, answers: tuple[list[Any], list[Any]]) -> None:
    with pytest.raises(ValueError, match="same questions"):
        compare(*answers)


def test_paired_difference_by_hand() -> None:
    # a = 9/102, b = 4/102; half = 1.96 sqrt((13/102 - (5/102)^2) / 102)
    got = paired_difference(*pair(8, 3, both=60, neither=29))
    assert got.difference == pytest.approx(5.0)
    half = 1.959964 * math.sqrt((13 / 102 - (5 / 102) ** 2) / 102)
    assert got.low == pytest.approx(100 * (5 / 102 - half), abs=1e-4)
    assert got.high == pytest.approx(100 * (5 / 102 + half), abs=1e-4)


def test_intervals_of_a_family_are_those_of_a_higher_level() -> None:
    answers = pair(40, 20, both=500, neither=100)
    one, five = paired_difference(*answers), paired_difference(*answers, comparisons=5)
    assert five.difference == one.difference
    # The normal quantiles of 97.5 % and of 99.5 %, from a table.
    assert (five.high - five.low) / (one.high - one.low) == pytest.approx(2.5758 / 1.9600, abs=1e-4)


def test_paired_difference_turns_with_the_methods() -> None:
    a, b = pair(8, 3, both=60, neither=29)
    forth, back = paired_difference(a, b), paired_difference(b, a)
    turned = (-back.difference, -back.high, -back.low)
    assert (forth.difference, forth.low, forth.high) == pytest.approx(turned)


def test_identical_answers_still_leave_uncertainty() -> None:
    got = paired_difference(*pair(0, 0, both=80, neither=20))
    assert got.difference == 0
    assert got.low == pytest.approx(-got.high)
    assert 1 < got.high < 5


def test_paired_difference_stays_within_the_possible() -> None:
    got = paired_difference([True], [False])
    assert (got.difference, got.high) == (100, 100)
    assert got.low > -100


def test_paired_difference_agrees_with_the_bootstrap_at_the_size_of_a_run() -> None:
    table = (210, 150, 3300, 340)
    got = paired_difference(*pair(*table))
    draws = np.random.default_rng(0).multinomial(4000, np.array(table) / 4000, size=20000)
    differences = 100 * (draws[:, 0] - draws[:, 1]) / 4000
    low, high = np.percentile(differences, [2.5, 97.5])
    assert (got.low, got.high) == pytest.approx((low, high), abs=0.05)


@pytest.mark.parametrize(
    ("p_a", "p_b", "n"),
    [(0.02, 0.02, 50), (0.10, 0.02, 50), (0.15, 0.15, 200), (0.05, 0.03, 1000), (0.30, 0.05, 100)],
)
def test_paired_interval_covers_the_truth(p_a: float, p_b: float, n: int) -> None:
    rng = np.random.default_rng(1)
    draws = rng.multinomial(n, [p_a, p_b, 1 - p_a - p_b], size=1500)
    covered = 0
    for only_a, only_b, rest in draws:
        a = np.repeat([True, False, True], [only_a, only_b, rest])
        b = np.repeat([False, True, True], [only_a, only_b, rest])
        got = paired_difference(a, b)
        covered += got.low <= 100 * (p_a - p_b) <= got.high
    # four standard errors of a simulated 95 % are 2.3 points; few differences make it conservative
    assert 0.927 <= covered / len(draws) <= 1.0
    if n * min(p_a, p_b) >= 5:
        assert covered / len(draws) <= 0.973


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.5))
def test_holm_rejects_what_the_step_down_procedure_rejects(
    p_values: list[float], alpha: float
) -> None:
    m = len(p_values)
    rejected: set[int] = set()
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        if (m - rank) * p_values[index] > alpha:
            break
        rejected.add(int(index))
    assert {i for i, p in enumerate(holm(p_values)) if p <= alpha} == rejected


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_holm_refuses_what_is_no_probability(bad: float) -> None:
    with pytest.raises(ValueError, match="not a p-value"):
        holm([0.5, bad])

"""The intervals of the claims against simulations of trainings, draws and questions."""

from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import NDArray

from qvlm.evaluation.metrics import paired_difference
from qvlm.tables.claims.components import (
    Prior,
    Spread,
    estimate,
    likeness_of,
    priors_of,
)

METHODS = 8
# As on the page: most claims are about the last method, and one is about a method of no draws.
PAIRS = [(7, i) for i in range(5)] + [(1, 0), (3, 2), (5, 4), (7, 6)]
WITHOUT_DRAWS = 6


def test_the_variance_of_the_mean_is_found_without_bias() -> None:
    """Of Gaussian effects, whose variance of the mean is known."""
    rng = np.random.default_rng(0)
    shape = trainings, draws, questions = 3, 4, 20
    variances = {"T": 1.0, "D": 0.5, "Q": 2.0, "TQ": 3.0, "DQ": 1.0, "TDQ": 4.0}
    found = []
    for _ in range(3000):
        values = np.zeros(shape)
        for name, variance in variances.items():
            size = [n if axis in name else 1 for n, axis in zip(shape, "TDQ", strict=True)]
            values = values + rng.normal(scale=100 * variance**0.5, size=size)
        parts = Spread.of(values).parts
        found.append(
            parts["T"]
            + parts["D"]
            - parts["TD"]
            + parts["Q"]
            - parts["TQ"]
            - parts["DQ"]
            + parts["TDQ"]
        )
    counts = {"T": trainings, "D": draws, "Q": questions}
    true = sum(
        variance / np.prod([counts[axis] for axis in name]) for name, variance in variances.items()
    )
    assert np.mean(found) == pytest.approx(100**2 * true, rel=0.03)


def simulate(
    rng: np.random.Generator, shape: tuple[int, int, int], trained: float, drawn: float
) -> tuple[list[NDArray[np.bool_]], list[float]]:
    """Answers of methods whose right share moves with training and draw, and their true shares."""
    trainings, draws, questions = shape
    hard = rng.standard_normal(questions)
    learned = 0.6 * rng.standard_normal((trainings, 1, questions))
    answers, truth = [], []
    for method, mean in enumerate(np.linspace(0.9, 1.1, METHODS)):
        spread = np.exp(0.2 * rng.standard_normal())  # methods differ in how much they move
        a, b = spread * trained, spread * drawn * (method != WITHOUT_DRAWS)
        own = 0.25 * rng.standard_normal((trainings, 1, questions))
        noise = 0.35 * rng.standard_normal((trainings, draws if b else 1, questions))
        latent = mean + hard + learned + own + noise
        latent = latent + a * rng.standard_normal((trainings, 1, 1))
        latent = latent + b * rng.standard_normal((1, draws, 1))
        latent = latent + b / 2 * rng.standard_normal((trainings, draws, 1))
        answers.append(np.broadcast_to(latent > 0, shape))
        total = 1 + 0.6**2 + 0.25**2 + 0.35**2 + a**2 + 1.25 * b**2
        truth.append(NormalDist().cdf(mean / total**0.5))
    return answers, truth


@pytest.mark.slow
def test_intervals_cover_where_trainings_and_draws_vary_and_the_old_ones_do_not() -> None:
    rng = np.random.default_rng(2)
    likeness = likeness_of([((m, a), (m, b)) for m in (0, 1) for a, b in PAIRS])
    covered, old = [], []
    for _ in range(150):
        differences, truth = [], []
        for _ in range(2):  # models
            answers, shares = simulate(rng, (3, 5, 400), trained=0.06, drawn=0.05)
            for a, b in PAIRS:
                differences.append(100 * (answers[a].astype(float) - answers[b]))
                truth.append(100 * (shares[a] - shares[b]))
                single = paired_difference(answers[a][0, 0], answers[b][0, 0])
                old.append(single.low <= truth[-1] <= single.high)
        spreads = [Spread.of(values) for values in differences]
        priors = priors_of(spreads, likeness)
        for spread, true in zip(spreads, truth, strict=True):
            found = estimate(spread, priors)
            covered.append(found.low <= true <= found.high)
    assert 0.935 <= np.mean(covered) <= 0.965
    assert np.mean(old) < 0.85


@pytest.mark.slow
def test_intervals_of_one_training_cover_that_training() -> None:
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(150):
        answers, shares = simulate(rng, (1, 5, 400), trained=0.0, drawn=0.06)
        spreads = [Spread.of(100 * (answers[a].astype(float) - answers[b])) for a, b in PAIRS]
        priors = priors_of(spreads, likeness_of(PAIRS))
        for (a, b), spread in zip(PAIRS, spreads, strict=True):
            found = estimate(spread, priors)
            covered.append(found.low <= 100 * (shares[a] - shares[b]) <= found.high)
            assert found.errors["T"] == 0
    assert 0.93 <= np.mean(covered) <= 0.98


def test_intervals_of_a_family_are_wider() -> None:
    rng = np.random.default_rng(4)
    spread = Spread.of(100 * rng.integers(-1, 2, (3, 5, 200)).astype(float))
    alone, family = (estimate(spread, priors_of([spread]), count) for count in (1, 22))
    assert alone.mean == family.mean
    assert family.high - family.low > 1.5 * (alone.high - alone.low)


def test_a_single_cell_has_the_interval_of_its_questions() -> None:
    rng = np.random.default_rng(5)
    first, second = rng.random((2, 3000)) < [[0.8], [0.7]]
    spread = Spread.of(100 * (first.astype(float) - second)[None, None])
    found = estimate(spread, priors_of([spread]))
    paired = paired_difference(first, second)
    assert found.mean == pytest.approx(paired.difference)
    assert (found.low, found.high) == pytest.approx((paired.low, paired.high), abs=0.05)


def test_methods_that_never_differ_may_differ_on_the_next_question() -> None:
    found = estimate(Spread.of(np.zeros((1, 1, 1000))), priors_of([]))
    assert found.low < 0 < found.high < 1


def test_a_prior_finds_the_common_ratio_and_how_alike_claims_are() -> None:
    """Ratios of 4 degrees of freedom around true ones of a scaled inverse chi-square law."""
    rng = np.random.default_rng(6)
    true = 3.0 * 8 / rng.chisquare(8, 4000)
    measured = true * rng.chisquare(4, 4000) / 4
    prior = Prior.fit(measured.tolist(), 4)
    assert prior.ratio == pytest.approx(3.0, rel=0.1)
    assert prior.freedom == pytest.approx(8, rel=0.25)
    alike = Prior.fit((3.0 * rng.chisquare(4, 4000) / 4).tolist(), 4)
    assert alike.freedom > 100
    value, freedom = prior.moderate(1.0, 1.0, 4)
    assert 1.0 < value < 3.0
    assert freedom == pytest.approx(12, rel=0.25)


def test_two_claims_say_nothing_about_others() -> None:
    assert Prior.fit([1.0, 9.0], 2) == Prior()
    assert Prior().moderate(2.0, 1.0, 3) == (2.0, 3)


def test_claims_that_share_a_method_are_alike() -> None:
    assert likeness_of([("a", "b"), ("c", "d")]) == 0
    assert likeness_of([("a", "b"), ("a", "c")]) == 0.25
    assert likeness_of([("a", "b"), ("c", "a")]) == 0.25
    assert likeness_of([("a", "b")]) == 0

"""The partition against eq. 6 and 7 and against every other partition there is."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlm.errors import UserError
from qvlm.methods.qvlm.partition import (
    belongs_together,
    check_depth,
    check_threshold,
    distant,
    mean_dependency,
    partition,
)

pytestmark = pytest.mark.instruction_set

# Eighths add up without rounding, so that ties are ties.
VALUES = st.one_of(st.none(), st.integers(0, 40).map(lambda value: value / 8))
LISTS = st.lists(VALUES, max_size=12)
THRESHOLDS = st.integers(0, 40).map(lambda value: value / 8)
DEPTHS = st.integers(1, 5)


def every_partition(count: int) -> list[list[range]]:
    """All ways to cut 0 .. count - 1 into runs."""
    found = []
    for cuts in range(count):
        for places in combinations(range(1, count), cuts):
            ends = [0, *places, count]
            found.append([range(a, b) for a, b in pairwise(ends)])
    return found


def allowed(block: range, dependencies: list[float | None], depth: int, threshold: float) -> bool:
    """Equation 7 for one block, with the depth bound."""
    inside = dependencies[block.start : block.stop - 1]
    if len(block) == 1:
        return True
    if len(block) > depth or None in inside:
        return False
    return sum(value for value in inside if value is not None) > len(inside) * threshold


def held(blocks: list[range], dependencies: list[float | None]) -> float:
    inside = [dependencies[index] for block in blocks for index in block[:-1]]
    return sum(value for value in inside if value is not None)


@settings(max_examples=200, deadline=None)
@given(LISTS, DEPTHS, THRESHOLDS)
def test_blocks_cover_in_order_and_obey_depth_and_equation_7(
    dependencies: list[float | None], depth: int, threshold: float
) -> None:
    blocks = partition(dependencies, depth, threshold)
    assert [layer for block in blocks for layer in block] == list(range(len(dependencies) + 1))
    assert all(allowed(block, dependencies, depth, threshold) for block in blocks)


@settings(max_examples=100, deadline=None)
@given(st.lists(VALUES, max_size=7), DEPTHS, THRESHOLDS)
def test_no_other_partition_holds_more_dependency(
    dependencies: list[float | None], depth: int, threshold: float
) -> None:
    best = max(
        held(blocks, dependencies)
        for blocks in every_partition(len(dependencies) + 1)
        if all(allowed(block, dependencies, depth, threshold) for block in blocks)
    )
    blocks = partition(dependencies, depth, threshold)
    assert held(blocks, dependencies) == best
    assert partition(dependencies, depth, threshold) == blocks


@settings(max_examples=100, deadline=None)
@given(LISTS, THRESHOLDS)
def test_equation_6_and_7(dependencies: list[float | None], threshold: float) -> None:
    for first in range(len(dependencies) + 1):
        assert distant(dependencies, first, first) == 0
        for last in range(first, len(dependencies) + 1):
            between = dependencies[first:last]
            total = None if None in between else sum(value or 0 for value in between)
            assert distant(dependencies, first, last) == total
            expected = first == last or (total is not None and total > (last - first) * threshold)
            assert belongs_together(dependencies, first, last, threshold) == expected


def test_known_partitions() -> None:
    assert partition([], 3, 0.0) == [range(0, 1)]
    assert partition([1.0, 1.0], 3, 0.5) == [range(0, 3)]
    assert partition([1.0, 1.0], 3, 1.0) == [range(0, 1), range(1, 2), range(2, 3)]  # not above
    # A weak step is carried by a strong one: 0.4 + 2 > 2 * 1.
    assert partition([0.4, 2.0], 3, 1.0) == [range(0, 3)]
    assert partition([0.4, 2.0], 2, 1.0) == [range(0, 1), range(1, 3)]
    assert partition([2.0, None, 2.0], 4, 0.1) == [range(0, 2), range(2, 4)]
    # Greedily from the left would take 0 and 1 first and lose the strong pair.
    assert partition([1.1, 5.0, 1.1], 2, 1.0) == [range(0, 1), range(1, 3), range(3, 4)]
    assert partition([3.0] * 6, 1, 0.0) == [range(index, index + 1) for index in range(7)]


def test_the_default_threshold_is_the_mean_of_what_is_known() -> None:
    assert mean_dependency([1.0, None, 2.0, 6.0]) == 3.0
    assert mean_dependency([None, None]) == mean_dependency([]) == 0.0


@pytest.mark.parametrize("depth", [0, -1, 2.0, True, None, "3"])
def test_an_impossible_depth_is_refused(depth: object) -> None:
    message = rf"^method\.max_depth={depth!r}: accepted are whole numbers from 1$"
    with pytest.raises(UserError, match=message):
        check_depth(depth)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        partition([1.0], depth, 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), float("inf"), True, "0.5", [1]])
def test_an_impossible_threshold_is_refused(threshold: object) -> None:
    with pytest.raises(UserError, match=r"^method\.h0=.*: accepted are null .* numbers from 0$"):
        check_threshold(threshold)  # type: ignore[arg-type]
    check_threshold(None)
    check_threshold(0)

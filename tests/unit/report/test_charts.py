"""Axes hold what they show, and marks lie where their values are."""

import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qvlm.report.charts import Axis, Point, bands, chart, columns, linear_axis, log_axis


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
@example([0.3])
def test_a_linear_axis_holds_its_values(values: list[float]) -> None:
    axis = linear_axis(values)
    assert axis.low <= min(values)
    assert axis.high >= max(values)
    assert 2 <= len(axis.ticks) <= 8
    steps = {
        round((b[0] - a[0]) / (axis.ticks[1][0] - axis.ticks[0][0]), 6)
        for a, b in zip(axis.ticks, axis.ticks[1:], strict=False)
    }
    assert steps == {1.0}
    assert len({text for _, text in axis.ticks}) == len(axis.ticks)


def test_percentages_end_at_a_hundred() -> None:
    axis = linear_axis([52.0, 99.9], most=100)
    assert [text for _, text in axis.ticks] == ["40", "60", "80", "100"]
    assert axis.share(70) == pytest.approx(50)


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=20))
def test_a_logarithmic_axis_holds_its_values(values: list[float]) -> None:
    axis = log_axis(values)
    assert len(axis.ticks) <= 7
    for value in values:
        assert 0 <= axis.share(value) <= 100
    low, high = axis.low, axis.high
    assert axis.share(math.sqrt(low * high)) == pytest.approx(50)


def test_categories_run_from_top_to_bottom_and_from_left_to_right() -> None:
    assert [bands(["a", "b"]).share(value) for value, _ in bands(["a", "b"]).ticks] == [75, 25]
    assert [columns(["a", "b"]).share(value) for value, _ in columns(["a", "b"]).ticks] == [25, 75]


def test_marks_and_intervals_lie_where_their_values_are() -> None:
    axis = Axis(0, 10, [(0, "0"), (10, "10")])
    point = Point(2, 5, 'A "quoted" <label>', 3, (7, 8), low=4, high=6, tag="W4A4")
    text = chart("Name", axis, axis, [point], [[point, Point(4, 10, "b", 3)]])
    assert 'x="20.00%" y="50.00%"' in text
    assert 'x1="20.00%" y1="60.00%" x2="20.00%" y2="40.00%"' in text  # from 4 to 6, upwards
    assert 'x1="20.00%" y1="50.00%" x2="40.00%" y2="0.00%"' in text  # the line
    assert 'data-run="7 8"' in text
    assert "<label>" not in text
    assert re.findall(r">(W4A4)<", text) == ["W4A4"]

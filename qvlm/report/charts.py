"""Charts as SVG whose coordinates are percentages: they fit any width and keep the size of text.

A chart is a plain `<svg>` inside a box that leaves room for its labels, so it needs no script to be
seen. Each point is a mark (a shape and a color per method) that can be reached by keyboard and has
a label for screen readers; `report.js` adds the card that says where the point comes from.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape


@dataclass(frozen=True)
class Point:
    """A measured value.

    Attributes:
        x, y: Place in the units of the axes.
        label: What the point shows, as a sentence for the card and for screen readers.
        mark: Mark of its method.
        runs: Numbers of the records that it comes from.
        low, high: Ends of an interval, or None.
        tag: Short text beside the mark, or "".
    """

    x: float
    y: float
    label: str
    mark: int
    runs: Sequence[int] = ()
    low: float | None = None
    high: float | None = None
    tag: str = ""


@dataclass(frozen=True)
class Axis:
    """The range of an axis, its ticks and its title.

    Attributes:
        low, high: Ends of the axis.
        ticks: Values with their labels.
        title: What the axis shows, with its unit.
        logarithmic: Whether equal distances are equal factors.
    """

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    title: str = ""
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Returns the place of a value in percent of the axis."""
        if self.logarithmic:
            span = math.log(self.high) - math.log(self.low)
            return 100 * (math.log(value) - math.log(self.low)) / span
        return 100 * (value - self.low) / (self.high - self.low)


def linear_axis(values: Iterable[float], title: str = "", most: float | None = None) -> Axis:
    """Returns an axis that holds all values, with about five round ticks.

    Args:
        values: Values to hold.
        title: What the axis shows.
        most: Largest value that can be, such as 100 for percentages.
    """
    found = list(values)
    low, high = min(found), max(found)
    raw = max(high - low, 1e-9 * max(1.0, abs(high)), 1e-12) / 4
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    if last == first:
        last += 1
    if most is not None:
        last = min(last, math.ceil(most / step))
    digits = max(0, -math.floor(math.log10(step) + 1e-9) + (step / unit == 2.5))
    ticks = [(i * step, f"{i * step:.{digits}f}") for i in range(first, last + 1)]
    # A multiple of the step may be rounded past the value that it stands for.
    return Axis(min(first * step, low), max(last * step, high), ticks, title)


# Factors of the ticks within a power of ten, and every which power has ticks, from dense to sparse.
_TICKS = (((1, 1.5, 2, 3, 5, 7), 1), ((1, 2, 5), 1), ((1,), 1), ((1,), 2), ((1,), 3), ((1,), 6))


def log_axis(values: Iterable[float], title: str = "", most: int = 7) -> Axis:
    """Returns a logarithmic axis that holds all values, with at most `most` round ticks."""
    found = list(values)
    low, high = min(found) / 1.15, max(found) * 1.15
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for factors, step in (
        ((1, 1.5, 2, 3, 5, 7), 1),
        ((1, 2, 5), 1),
        ((1,), 1),
        ((1,), 2),
        ((1,), 3),
    ):
        round_ = [
            factor * 10.0**power for power in powers if power % step == 0 for factor in factors
        ]
        ticks = [(value, f"{value:g}") for value in round_ if low <= value <= high]
        if len(ticks) <= most:
            break
    return Axis(low, high, ticks, title, logarithmic=True)


def bands(names: Sequence[str]) -> Axis:
    """Returns an axis of categories from top to bottom: the i-th has its middle at i + 0.5."""
    return Axis(len(names), 0, [(i + 0.5, name) for i, name in enumerate(names)])


def columns(names: Sequence[str], title: str = "") -> Axis:
    """Returns an axis of categories from left to right: the i-th has its middle at i + 0.5."""
    return Axis(0, len(names), [(i + 0.5, name) for i, name in enumerate(names)], title)


def chart(
    name: str,
    x: Axis,
    y: Axis,
    points: Sequence[Point],
    lines: Sequence[Sequence[Point]] = (),
    height: int = 280,
    sideways: bool = False,
) -> Markup:
    """Returns a chart.

    Args:
        name: What the chart shows, for screen readers.
        x, y: Axes.
        points: Points to mark.
        lines: Points that a line joins, from left to right, each with the mark of its first point.
        height: Height of the plot in pixels.
        sideways: Whether intervals lie along x instead of y.
    """
    parts = [_grid(x, y)]
    for line in lines:
        for a, b in pairwise(line):
            ends = _ends(x.share(a.x), y.share(a.y), x.share(b.x), y.share(b.y))
            parts.append(f'<line class="line c{line[0].mark}" {ends}/>')
    for point in points:
        parts.append(_interval(point, x, y, sideways))
        if point.tag:
            place = f'x="{x.share(point.x):.2f}%" y="{100 - y.share(point.y):.2f}%"'
            parts.append(f'<text class="tag" {place} dx="10" dy="4">{escape(point.tag)}</text>')
    for point in points:
        runs = " ".join(map(str, point.runs))
        parts.append(
            f'<use href="#m{point.mark}" class="point c{point.mark}" x="{x.share(point.x):.2f}%" '
            f'y="{100 - y.share(point.y):.2f}%" role="img" tabindex="-1" data-run="{runs}" '
            f'data-about="{escape(point.label)}" aria-label="{escape(point.label)}"/>'
        )
    title = f'<p class="axis">{escape(x.title)}</p>' if x.title else ""
    above = f'<p class="axis up">{escape(y.title)}</p>' if y.title else ""
    kind = " wide-labels" if sideways else ""
    return Markup(
        f'{above}<div class="plot{kind}" role="group" aria-label="{escape(name)}">'
        f'<svg style="height:{height}px">{"".join(parts)}</svg></div>{title}'
    )


def _grid(x: Axis, y: Axis) -> str:
    parts = []
    for value, text in x.ticks:
        at = x.share(value)
        parts.append(f'<line class="grid" {_ends(at, 0, at, 100)}/>')
        parts.append(f'<text class="tick x" x="{at:.2f}%" y="100%" dy="18">{escape(text)}</text>')
    for value, text in y.ticks:
        at = y.share(value)
        parts.append(f'<line class="grid" {_ends(0, at, 100, at)}/>')
        place = f'y="{100 - at:.2f}%" dx="-8" dy="4"'
        parts.append(f'<text class="tick y" x="0" {place}>{escape(text)}</text>')
    return f'<g aria-hidden="true">{"".join(parts)}</g>'


def _interval(point: Point, x: Axis, y: Axis, sideways: bool) -> str:
    if point.low is None or point.high is None:
        return ""
    if sideways:
        at = y.share(point.y)
        ends = _ends(x.share(max(point.low, x.low)), at, x.share(min(point.high, x.high)), at)
    else:
        at = x.share(point.x)
        ends = _ends(at, y.share(max(point.low, y.low)), at, y.share(min(point.high, y.high)))
    return f'<line class="interval c{point.mark}" {ends}/>'


def _ends(x1: float, y1: float, x2: float, y2: float) -> str:
    """Returns the ends of a line; y runs from the bottom to the top."""
    return f'x1="{x1:.2f}%" y1="{100 - y1:.2f}%" x2="{x2:.2f}%" y2="{100 - y2:.2f}%"'

"""Which consecutive layers are searched jointly.

Q-VLM (arXiv 2410.08119), eq. (6) and (7). The paper calls such layers a block; here they are a
segment, since a block is one step of the calibration walk. The dependency of two distant layers is
the sum of the consecutive ones between them. Layers k_r .. k_s may form a segment if they depend on
each other by more than a threshold per step,

    D(k_r, k_s) = sum_{k = r}^{s - 1} D(k, k + 1) > (k_s - k_r) h_0,

with at most `max_depth` layers (3 in the paper, where more gain little and cost much). A layer that
shares its segment with no other is searched alone.

The paper does not say which segments to take where several overlap. Here they are those that
together contain the most dependency, found exactly by dynamic programming. Of equal ones, the first
in a scan that begins with the deepest last segment is taken. Joint search of a segment is never
worse on its output than layer-wise search, so what is lost is the dependency between segments.

The threshold is the mean of the dependencies unless it is given. The released code compares with
the running mean, which depends on the order in which layers are visited.
"""

from collections.abc import Sequence
from statistics import fmean

from qvlm import validation

Dependencies = Sequence[float | None]
"""D(k, k + 1) of consecutive layers in nats; None where there is none, which no segment spans."""


def distant(dependencies: Dependencies, first: int, last: int) -> float | None:
    """D(k_first, k_last), the sum of the consecutive ones (eq. 6); None if one is missing."""
    total = 0.0
    for value in dependencies[first:last]:
        if value is None:
            return None
        total += value
    return total


def belongs_together(dependencies: Dependencies, first: int, last: int, threshold: float) -> bool:
    """Whether layers first .. last (inclusive) may be a segment (eq. 7); one layer always may."""
    total = distant(dependencies, first, last)
    return first == last or (total is not None and total > (last - first) * threshold)


def mean_dependency(dependencies: Dependencies) -> float:
    """The default threshold h_0; 0 if there is no dependency."""
    known = [value for value in dependencies if value is not None]
    return fmean(known) if known else 0.0


def partition(dependencies: Dependencies, max_depth: int, threshold: float) -> list[range]:
    """Groups layers into segments that satisfy eq. (7).

    Args:
        dependencies: Dependencies of n layers, n - 1 values.
        max_depth: Largest number of layers of a segment.
        threshold: Threshold h_0 per step, in nats.

    Returns:
        Ranges of layer indices, in order, that cover 0 .. n - 1.

    Raises:
        UserError: If the depth is not a whole number from 1.
    """
    check_depth(max_depth)
    # best[end]: most dependency within segments of the first `end` layers, and where the last of
    # these segments starts.
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(dependencies) + 2):
        most: tuple[float, int] | None = None
        for start in range(max(0, end - max_depth), end):
            if not belongs_together(dependencies, start, end - 1, threshold):
                continue
            held = best[start][0] + (distant(dependencies, start, end - 1) or 0.0)
            if most is None or held > most[0]:
                most = held, start
        assert most is not None  # a layer alone is always a segment
        best.append(most)
    segments: list[range] = []
    end = len(dependencies) + 1
    while end:
        segments.append(range(best[end][1], end))
        end = best[end][1]
    return segments[::-1]


def check_depth(max_depth: int) -> None:
    """Raises UserError if the depth is not a whole number from 1."""
    validation.whole_number("method.max_depth", max_depth)


def check_threshold(threshold: float | None) -> None:
    """Raises UserError if the threshold is neither None nor a finite number of at least 0."""
    if threshold is not None:
        validation.number("method.h0", threshold)

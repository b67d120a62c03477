"""Which consecutive layers are searched jointly.

Q-VLM (arXiv 2410.08119), eq. (6) and (7). The dependency of layers further apart is the sum of the
consecutive ones between them, and layers k_r .. k_s may form a block if they depend on each other
by more than a threshold per step,

    D(k_r, k_s) = sum_{k = r}^{s - 1} D(k, k + 1) > (k_s - k_r) h_0,

with at most `max_depth` layers in it (3 in the paper: more gains little and costs much). A layer
that is in no block with another is searched alone.

The paper does not say which blocks to take where several overlap. Here: those that together hold
the most dependency, found exactly by dynamic programming; of equal ones, the first that a scan with
the deepest last block first meets. Joint search of a block is never worse on its output than
layer-wise search, so a dependency left between two blocks is what is lost.

The threshold, unless given, is the mean of the dependencies; the released code compares with the
running mean, which depends on the order in which layers are visited.
"""

from collections.abc import Sequence
from math import inf
from statistics import fmean

from qvlm.methods.qvlm.options import check_whole, is_number, refused

Dependencies = Sequence[float | None]
"""D(k, k + 1) of consecutive layers; None where there is none, so that no block may span it."""


def distant(dependencies: Dependencies, first: int, last: int) -> float | None:
    """D(k_first, k_last), the sum of the consecutive ones (eq. 6); None if one is missing."""
    total = 0.0
    for value in dependencies[first:last]:
        if value is None:
            return None
        total += value
    return total


def belongs_together(dependencies: Dependencies, first: int, last: int, threshold: float) -> bool:
    """Whether layers first .. last (inclusive) may be one block (eq. 7); one layer always may."""
    total = distant(dependencies, first, last)
    return first == last or (total is not None and total > (last - first) * threshold)


def mean_dependency(dependencies: Dependencies) -> float:
    """The default threshold h_0; 0 if there is no dependency."""
    known = [value for value in dependencies if value is not None]
    return fmean(known) if known else 0.0


def partition(dependencies: Dependencies, max_depth: int, threshold: float) -> list[range]:
    """Groups layers into blocks of at most `max_depth` that satisfy eq. (7).

    Args:
        dependencies: of n layers, n - 1 values.
        threshold: h_0.

    Returns:
        Ranges of layer indices, in order, that cover 0 .. n - 1.

    Raises:
        UserError: if the depth is not a whole number from 1.
    """
    check_depth(max_depth)
    # best[end]: most dependency that blocks of the first `end` layers hold, and the last block.
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(dependencies) + 2):
        choice: tuple[float, int] | None = None
        for start in range(max(0, end - max_depth), end):
            if not belongs_together(dependencies, start, end - 1, threshold):
                continue
            held = best[start][0] + (distant(dependencies, start, end - 1) or 0.0)
            if choice is None or held > choice[0]:
                choice = held, start
        assert choice is not None  # a layer alone is always a block
        best.append(choice)
    blocks: list[range] = []
    end = len(dependencies) + 1
    while end:
        blocks.append(range(best[end][1], end))
        end = best[end][1]
    return blocks[::-1]


def check_depth(max_depth: int) -> None:
    """Raises UserError for an impossible depth of a block."""
    check_whole("max_depth", max_depth)


def check_threshold(threshold: float | None) -> None:
    """Raises UserError for a threshold that no dependency can be compared with."""
    if threshold is not None and not (is_number(threshold) and 0 <= threshold < inf):
        raise refused("h0", threshold, "null (from the data) and finite numbers from 0")

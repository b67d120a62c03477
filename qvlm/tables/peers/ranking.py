"""Who is first, and by how much: a rule that reads nothing but seconds."""

import statistics
from collections.abc import Sequence

from qvlm.tables.cost import median_and_range
from qvlm.tables.peers.measure import Times


def first(times: Times) -> str:
    """Returns the name of the peer with the lowest median."""
    return min(times, key=lambda name: statistics.median(times[name]))


def faster(other: Sequence[float], own: Sequence[float]) -> list[float]:
    """Returns how many times faster `own` is than `other` in each repeat."""
    return [theirs / ours for theirs, ours in zip(other, own, strict=True)]


def verdict(times: Times, ours: str) -> str:
    """Returns a sentence on who is first, or on whom the repeats do not tell apart.

    We are compared with the fastest of the others, and a peer that is first with us.

    Args:
        times: Seconds of each repeat of the peers that are compared, by name.
        ours: Name of our own.
    """
    others = {name: seconds for name, seconds in times.items() if name != ours}
    if not others:
        return f"{ours} alone was measured."
    winner = first(times)
    second = first(others) if winner == ours else ours
    ratios = faster(times[second], times[winner])
    if min(ratios) > 1:
        return f"**{winner}** is first, {median_and_range(ratios)} times as fast as {second}."
    return (
        f"{winner} and {second} are not told apart: the former is {median_and_range(ratios)} times "
        "as fast as the latter."
    )

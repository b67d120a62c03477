"""Joint search of the clipping percentiles of a block of layers.

Q-VLM (arXiv 2410.08119), section 3.2. Every layer of a block gets a percentile p from a small grid,
{1.0, 0.995, 0.99, 0.985, 0.98}, and all of them are chosen together to minimise the squared error
of the block's output, given inputs that the blocks before have already quantized (X_q). A block of
three layers has 5^3 = 125 settings and is searched exhaustively; where there are more, coordinate
descent starts from what layer-wise search finds. Layer-wise search is this search with one layer in
every block.

Percentile 1.0 is the range that every method starts from (the lp-minimal one). Below 1, a scale
group is clipped at the quantiles 1 - p and p of its own calibration values *instead*, or, with
`clip="further"`, at whichever of the two is tighter. An lp-minimal range with exponent 0.5 is so
tight already that hardly any percentile of the grid is tighter, and a search that can only tighten
it finds nothing; quantiles of the distribution go to both sides of it. Scales that are made per
token take the mean share of a token's range that lies between the two quantiles.

The output of a block is, by default, that of the decoder layer that its last linear is part of:
queries, keys and values are no sequence, and only there do their errors meet. `output="block"` has
the narrower reading: what the block's last linear puts out, and those beside it in the block that
read the same input. The reference is what the float block makes of the same inputs.

A sum of squared errors would be that of a few tokens of huge norm, so each token's error is divided
by the energy of its float output (`normalise`).

What does not depend on a candidate is not computed again (`trial.py`). A candidate whose error on
part of the calibration data is already above the best one's on all of it is not run on the rest,
since errors of batches only add up. Neither changes what is found.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, prod

import torch

from qvlm.errors import RunError, UserError
from qvlm.methods.qvlm.trial import Choice, Observed, Search, Trial
from qvlm.quantization import Block


@dataclass(frozen=True)
class Found:
    """What the search of one block found. Errors are on the block's output.

    Attributes:
        units: the linears of each layer of the block, by name in the walk's block.
        percentiles: of each layer.
        error: with these percentiles.
        layerwise_error: with what layer-wise search would choose; the difference to `error` is
            what searching jointly gains (the paper's discretization error difference).
        start_error: with every layer at the grid's first percentile.
        candidates: settings that were tried, those of the layer-wise search included.
    """

    units: tuple[tuple[str, ...], ...]
    percentiles: tuple[float, ...]
    error: float
    layerwise_error: float
    start_error: float
    candidates: int


@torch.no_grad()
def search_block(
    block: Block,
    runs: Sequence[Sequence[Sequence[str]]],
    search: Search,
    keep_float: bool = False,
) -> list[Found]:
    """Searches the runs of a block of the walk one after the other and quantizes its linears.

    Args:
        block: with its linears in floating point.
        runs: the blocks in the paper's sense, in order: a run is a sequence of layers, a layer the
            names of the linears that share a percentile.
        keep_float: leave the quantized linears trainable, see `QuantLinear`.

    Returns:
        A result per run; runs whose linears all saw no token have nothing to search and none.

    Raises:
        UserError: if the runs do not name every linear of the block once.
        RunError: if no setting of a run has a finite error.
    """
    _check_cover(block, runs)
    samples = block.linear_inputs()
    found = []
    with Trial(block, samples, search) as trial:
        for run in runs:
            seen = [[name for name in unit if len(samples[name])] for unit in run]
            seen = [unit for unit in seen if unit]
            if seen:
                found.append(_search_run(trial, seen))
    for name, layer in trial.chosen_layers(keep_float).items():
        block.replace(name, layer)
    return found


def minimise(
    error: Callable[[Choice, float], float], sizes: Sequence[int], start: Choice, exhaustive: int
) -> Choice:
    """The setting of least error among `sizes[0] x sizes[1] x ...`.

    Up to `exhaustive` settings all are tried, the last index running fastest, and the first of
    equal ones wins. Beyond, one index at a time is set to its best until none changes, beginning at
    `start`; the result is then never worse than `start`.

    Args:
        error: of a setting, given what it has to be at most: if it is above, any number above.
    """
    best: Choice = start
    enough = error(start, inf)
    if prod(sizes) <= exhaustive:
        lowest = inf
        for setting in itertools.product(*map(range, sizes)):
            if (value := error(setting, min(lowest, enough))) < lowest:
                best, lowest = setting, value
        return best
    lowest = enough
    while True:
        before = best
        for position, size in enumerate(sizes):
            for index in range(size):
                candidate = (*best[:position], index, *best[position + 1 :])
                if (value := error(candidate, lowest)) < lowest:
                    best, lowest = candidate, value
        if best == before:
            return best


def _search_run(trial: Trial, units: Sequence[Sequence[str]]) -> Found:
    """Layer-wise first, then jointly; leaves the trial at the best setting."""
    size = len(trial.search.percentiles)
    evaluated: dict[tuple[Choice, Choice, Observed], float] = {}

    def error(choice: Choice, first: int, last: int, bound: float) -> float:
        """Of units first .. last on their own output; those before are part of their input."""
        reference = (*choice[:first], *(None for _ in choice[first:]))
        observed = trial.observed(units[first : last + 1])
        if observed is None:
            reference = (None,) * len(units)  # the block's own target whatever is in front
        key = choice, reference, observed
        if key not in evaluated:
            evaluated[key] = trial.error(units, *key, bound)
        return evaluated[key]

    depth = len(units)

    def jointly(choice: Choice, bound: float = inf) -> float:
        return error(choice, 0, depth - 1, bound)

    start_error = jointly((0,) * depth)
    layerwise: Choice = ()

    def alone(choice: Choice, bound: float) -> float:
        """Of the next unit, behind those that are chosen layer-wise."""
        unit = len(layerwise)
        return error((*layerwise, *choice, *(None,) * (depth - unit - 1)), unit, unit, bound)

    while len(layerwise) < depth:
        layerwise += minimise(alone, [size], (0,), size)
    layerwise_error = jointly(layerwise)
    best = minimise(jointly, [size] * depth, layerwise, trial.search.exhaustive)
    lowest = jointly(best)
    if lowest == inf:
        raise RunError(f"no percentile gives {trial.block.layer_name(units[0][0])} a finite output")
    trial.settle(units, best)
    return Found(
        units=tuple(tuple(unit) for unit in units),
        percentiles=tuple(trial.search.percentiles[index] for index in best if index is not None),
        error=lowest,
        layerwise_error=layerwise_error,
        start_error=start_error,
        candidates=len(evaluated),
    )


def _check_cover(block: Block, runs: Sequence[Sequence[Sequence[str]]]) -> None:
    named = [name for run in runs for unit in run for name in unit]
    if sorted(named) != sorted(block.linears):
        wrong = sorted(set(named) ^ set(block.linears))
        raise UserError(
            f"the blocks must cover every linear of {block.name} once: "
            + (f"{wrong[0]} is missing or unknown" if wrong else "some are named twice")
        )

"""Joint search of the clipping percentiles of dependent layers.

Q-VLM (arXiv 2410.08119), section 3.2. The paper's blocks, consecutive layers that are searched
jointly, are called segments here, since a block is one step of the calibration walk. Each layer of
a segment gets a percentile p from a small grid, {1.0, 0.995, 0.99, 0.985, 0.98}. All of them are
chosen together to minimize the squared error of the segment's output, given inputs that the
segments before have already quantized (X_q). The reference is what the float block makes of the
same inputs. `search_options.py` states what p clips and what the output of a segment is.

A segment of three layers has 5^3 = 125 settings, and all are tried. Where there are more, a
coordinate descent starts from the result of layer-wise search, which is this search with one layer
in every segment. The released code does not contain this search; it follows the text of the paper.

What does not depend on a setting is not computed again (`trial.py`). A setting whose error on part
of the calibration data is already above the best one's on all of it is not run on the rest, since
the errors of batches add up. Neither changes the result.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, prod

import torch

from qvlm.errors import RunError, UserError
from qvlm.methods.qvlm.search_options import SearchOptions
from qvlm.methods.qvlm.trial import Observed, Setting, Trial
from qvlm.quantization import Block


@dataclass(frozen=True)
class Found:
    """The result of the search of one segment. Errors are those of the segment's output.

    Attributes:
        units: Names, in the walk's block, of the linears of each layer of the segment.
        percentiles: Chosen percentile of each layer.
        error: Error with these percentiles.
        layerwise_error: Error with the percentiles that layer-wise search chooses. Its difference
            to `error` is the gain of joint search, the paper's discretization error difference.
        start_error: Error with every layer at the grid's first percentile.
        candidates: Number of settings that were tried, those of the layer-wise search included.
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
    segments: Sequence[Sequence[Sequence[str]]],
    options: SearchOptions,
    keep_float: bool = False,
) -> list[Found]:
    """Searches the segments of a block one after the other and quantizes the block's linears.

    Args:
        block: Block of the walk, with its float linears.
        segments: Segments in order. A segment is a sequence of units (layers in the paper's sense),
            and a unit is the names of the linears that share a percentile.
        options: What is searched, and by which error.
        keep_float: Whether the quantized linears stay trainable, see `QuantLinear`.

    Returns:
        One result per segment, except for segments without data: those whose linears read no token
        in the calls that errors are measured on. They keep the first percentile of the grid;
        `unsearched` names them.

    Raises:
        UserError: If the segments do not name every linear of the block once.
        RunError: If no setting of a segment has a finite error.
    """
    _check_cover(block, segments)
    samples = block.linear_inputs()
    found = []
    with Trial(block, samples, options) as trial:
        with_data = {name for name in samples if len(samples[name])} & trial.reached()
        for segment in segments:
            read = [[name for name in unit if name in with_data] for unit in segment]
            read = [unit for unit in read if unit]
            if read:
                found.append(_search_segment(trial, read))
    for name, layer in trial.chosen_layers(keep_float).items():
        block.replace(name, layer)
    return found


def unsearched(block: Block, found: Sequence[Found]) -> list[str]:
    """Full names of the block's linears that are in no result, for lack of data."""
    searched = {name for result in found for unit in result.units for name in unit}
    return [block.layer_name(name) for name in block.linears if name not in searched]


def minimize(
    error: Callable[[Setting, float], float],
    sizes: Sequence[int],
    start: Setting,
    exhaustive: int,
) -> Setting:
    """Finds the setting of least error among `sizes[0] x sizes[1] x ...`.

    If there are at most `exhaustive` settings, all are tried, the last index varying fastest, and
    the first of equal ones wins. If there are more, one index at a time is set to its best value,
    beginning at `start`, until none changes; the result is never worse than `start`.

    Args:
        error: Function of a setting and a bound. It returns the setting's error, or any number
            above the bound if the error is above the bound.
        sizes: Number of values of each index.
        start: Setting to begin with.
        exhaustive: Largest number of settings that are all tried.
    """
    best: Setting = start
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


def _search_segment(trial: Trial, units: Sequence[Sequence[str]]) -> Found:
    """Searches layer-wise, then jointly, and leaves the trial at the best setting."""
    size = len(trial.options.percentiles)
    evaluated: dict[tuple[Setting, Setting, Observed], float] = {}

    def error(setting: Setting, first: int, last: int, bound: float) -> float:
        """The error of the output of units first .. last; those before are part of their input."""
        reference = (*setting[:first], *(None for _ in setting[first:]))
        observed = trial.observed(units[first : last + 1])
        if observed is None:
            reference = (None,) * len(units)  # the target is the block's, whatever comes before
        key = setting, reference, observed
        if key not in evaluated:
            evaluated[key] = trial.error(units, *key, bound)
        return evaluated[key]

    depth = len(units)

    def jointly(setting: Setting, bound: float = inf) -> float:
        return error(setting, 0, depth - 1, bound)

    start_error = jointly((0,) * depth)
    layerwise: Setting = ()

    def alone(setting: Setting, bound: float) -> float:
        """The error of the next unit alone, behind those that are set layer-wise."""
        unit = len(layerwise)
        return error((*layerwise, *setting, *(None,) * (depth - unit - 1)), unit, unit, bound)

    while len(layerwise) < depth:
        layerwise += minimize(alone, [size], (0,), size)
    layerwise_error = jointly(layerwise)
    best = minimize(jointly, [size] * depth, layerwise, trial.options.exhaustive)
    lowest = jointly(best)
    if lowest == inf:
        raise RunError(f"no percentile gives {trial.block.layer_name(units[0][0])} a finite output")
    trial.keep(units, best)
    return Found(
        units=tuple(tuple(unit) for unit in units),
        percentiles=tuple(trial.options.percentiles[index] for index in best if index is not None),
        error=lowest,
        layerwise_error=layerwise_error,
        start_error=start_error,
        candidates=len(evaluated),
    )


def _check_cover(block: Block, segments: Sequence[Sequence[Sequence[str]]]) -> None:
    named = [name for segment in segments for unit in segment for name in unit]
    if sorted(named) != sorted(block.linears):
        wrong = sorted(set(named) ^ set(block.linears))
        raise UserError(
            f"the segments must cover every linear of {block.name} once: "
            + (f"{wrong[0]} is missing or unknown" if wrong else "some are named twice")
        )

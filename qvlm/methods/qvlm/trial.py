"""A block of the walk whose linears can be switched between float and quantized candidates.

The workbench of the search: it makes the candidates, runs the block with any choice of them and
measures the error. What does not depend on a choice is not computed again: each linear remembers
the last output of each candidate in each call and repeats it for an equal input, so that of three
layers searched jointly the first is computed 5 times, not 125.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.methods.qvlm.options import check_choice, check_switch, check_whole, is_number, refused
from qvlm.quantization import (
    Block,
    Quantizer,
    QuantLinear,
    lp_minimal,
    minmax,
    percentile,
    weight_quantizer,
)
from qvlm.quantization.block import Call
from qvlm.quantization.ranges import Ranges
from qvlm.quantization.spec import QuantSpec

PERCENTILES = (1.0, 0.995, 0.99, 0.985, 0.98)
EXHAUSTIVE = 5**3
OUTPUTS = ("layer", "block")
CLIPS = ("percentile", "further")

Choice = tuple[int | None, ...]
"""For each unit of a run the index of its percentile; None leaves the unit in floating point."""

Observed = tuple[str, ...] | None
"""The linears whose outputs count; None for the output of the block."""


@dataclass(frozen=True)
class Search:
    """What is searched, and by which error.

    Args:
        percentiles: the grid, tried in this order; of equal errors the first wins.
        normalise: divide a token's squared error by the energy of its float output.
        output: "layer" or "block", see above.
        clip: "percentile" or "further", see above.
        clip_weights: the percentile clips the scale groups of the weight too.
        tokens: about how many calibration tokens the error is computed on, in whole batches.
        exhaustive: with more settings of a block than this, coordinate descent.

    Raises:
        UserError: naming the option and what it accepts.
    """

    percentiles: Sequence[float] = PERCENTILES
    normalise: bool = True
    output: str = "layer"
    clip: str = "percentile"
    clip_weights: bool = True
    tokens: int = 4096
    exhaustive: int = EXHAUSTIVE

    def __post_init__(self) -> None:
        grid = self.percentiles
        if isinstance(grid, str) or not isinstance(grid, Sequence) or not grid:
            raise refused("percentiles", grid, "lists of at least one number")
        if not all(is_number(p) and 0.5 < p <= 1 for p in grid):
            raise refused("percentiles", list(grid), "numbers above 0.5 and up to 1")
        check_switch("normalise", self.normalise)
        check_choice("output", self.output, OUTPUTS)
        check_choice("clip", self.clip, CLIPS)
        check_switch("clip_weights", self.clip_weights)
        check_whole("search_tokens", self.tokens)
        check_whole("exhaustive", self.exhaustive)


def output_error(
    outputs: Iterable[Tensor], targets: Sequence[Tensor], normalise: bool, bound: float = inf
) -> float:
    """Squared error per token of outputs [..., features], or its mean share of a token's energy.

    Outputs are asked for one after the other, and no more once the error is above `bound`, whatever
    the others are: then it is infinity.
    """
    total = 0.0
    count = max(1, sum(target.shape[:-1].numel() for target in targets))
    for output, target in zip(outputs, targets, strict=True):
        errors = (output.float() - target.float()).square().sum(-1)
        if normalise:
            errors = errors / target.float().square().sum(-1).clamp_min(1e-20)
        total += float(errors.sum(dtype=torch.float64))
        if total / count > bound:
            return inf
    return total / count


class Trial:
    """A block whose linears can be switched between float and every candidate.

    While the context is open, each linear that saw a token is replaced by one that remembers.
    """

    def __init__(self, block: Block, samples: dict[str, Tensor], search: Search) -> None:
        """Takes what each linear saw, [tokens, in]."""
        self.block = block
        self.search = search
        self._samples = samples
        self._cursor = _Cursor()
        self._layers = {
            name: _Remembering(block.linears[name], candidates, self._cursor)
            for name, candidates in _candidates(block, samples, search).items()
        }
        self._calls, self._targets = _some_calls(block, search.tokens)
        self._references: dict[tuple[Choice, Observed], list[Tensor]] = {}

    def __enter__(self) -> "Trial":
        for name, layer in self._layers.items():
            _put(self.block.module, name, layer)
        return self

    def __exit__(self, *error: object) -> None:
        for name in self._layers:
            self.block.restore(name)

    def choose(self, units: Sequence[Sequence[str]], choice: Choice) -> None:
        """Switches the linears of each unit to the candidate of its index."""
        for unit, index in zip(units, choice, strict=True):
            for name in unit:
                self._layers[name].index = index

    def settle(self, units: Sequence[Sequence[str]], choice: Choice) -> None:
        """`choose` for good."""
        self.choose(units, choice)
        self._references.clear()
        for name in (name for unit in units for name in unit):
            self._layers[name].forget_others()

    def observed(self, units: Sequence[Sequence[str]]) -> Observed:
        """The linears whose outputs are the output of a run; None for that of the whole block."""
        if self.search.output == "layer":
            return None
        names = [name for unit in units for name in unit]
        last = self._samples[names[-1]]
        return tuple(name for name in names if torch.equal(self._samples[name], last))

    def error(
        self,
        units: Sequence[Sequence[str]],
        choice: Choice,
        reference: Choice,
        observed: Observed,
        bound: float = inf,
    ) -> float:
        """The output error of a setting; infinity if it is not finite, or above the bound.

        Args:
            choice: for each unit.
            reference: the choice whose output is aimed at, where linears are observed.
            bound: an error above it is of no interest; the block is not run to the end for it.
        """
        if observed is None:
            targets = self._targets
        elif (reference, observed) in self._references:
            targets = self._references[reference, observed]
        else:
            self.choose(units, reference)
            targets = self._references[reference, observed] = list(self._run(observed))
        self.choose(units, choice)
        error = output_error(self._run(observed), targets, self.search.normalise, bound)
        return error if isfinite(error) else inf

    def chosen_layers(self, keep_float: bool) -> dict[str, QuantLinear]:
        """The quantized linears of the setting; of one that saw no token the shared default."""
        layers = {}
        for name, layer in self._layers.items():
            chosen = layer.candidates[layer.index or 0]
            if keep_float:
                chosen = QuantLinear.from_linear(
                    self.block.linears[name],
                    chosen.weight_quantizer,
                    chosen.input_quantizer,
                    keep_float=True,
                )
            layers[name] = chosen
        return layers

    def _run(self, observed: Observed) -> Iterator[Tensor]:
        """Outputs of one call after the other: of the block, or of linears that are observed."""
        for index, call in enumerate(self._calls):
            self._cursor.call = index
            if observed is None:
                yield from self.block.run(calls=[call])
                continue
            layers = {name: self._layers[name] for name in observed}
            with _watched(layers) as seen, suppress(_Enough):
                self.block.run(calls=[call])
            yield from (seen[name] for name in observed if name in seen)


class _Cursor:
    """Which call is running."""

    call = 0


class _Remembering(nn.Module):
    """A linear, or one of its candidates, that repeats its last output for an equal input.

    Attributes:
        index: of the candidate that is used; None for the float linear.
    """

    def __init__(self, linear: nn.Linear, candidates: list[QuantLinear], cursor: _Cursor) -> None:
        super().__init__()
        self.linear = linear
        self.candidates = candidates
        self.index: int | None = None
        self._cursor = cursor
        self._memory: dict[tuple[int | None, int], tuple[Tensor, Tensor, tuple[int, int]]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in] to [..., out]."""
        key = self.index, self._cursor.call
        if key in self._memory:
            seen, output, versions = self._memory[key]
            # A tensor's version counts who wrote into it: then it is no memory any more.
            if (seen._version, output._version) == versions and torch.equal(seen, x):
                return output
        layer = self.linear if self.index is None else self.candidates[self.index]
        output = layer(x)
        self._memory[key] = x, output, (x._version, output._version)
        return output

    def forget_others(self) -> None:
        """Lets go of what was remembered of other candidates."""
        self._memory = {key: kept for key, kept in self._memory.items() if key[0] == self.index}


def _candidates(
    block: Block, samples: Mapping[str, Tensor], search: Search
) -> dict[str, list[QuantLinear]]:
    """Each linear quantized with each percentile; one that saw no token only as by default."""
    found: dict[str, list[QuantLinear]] = {}
    last: tuple[Tensor, list[Quantizer]] | None = None
    for name, seen in samples.items():
        weight_spec, input_spec = block.spec(name)
        if len(seen) == 0:
            found[name] = [block.quantize_linear(name, seen)]
            continue
        if last is None or not torch.equal(last[0], seen):
            # Queries, keys and values read the same: their ranges are computed once.
            rules = [_rule(p, input_spec, search.clip) for p in search.percentiles]
            last = seen, [block.input_quantizer(name, seen, rule) for rule in rules]
        found[name] = []
        for p, quantizer in zip(search.percentiles, last[1], strict=True):
            rule = _rule(p, weight_spec, search.clip) if search.clip_weights else None
            kept = None
            if found[name] and not search.clip_weights and not quantizer.folds:
                kept = found[name][0].weight_quantizer  # the same weight, with the same ranges

            def weights(
                weight: Tensor,
                kept: Quantizer | None = kept,
                spec: QuantSpec = weight_spec,
                rule: Ranges | None = rule,
                inputs: Quantizer = quantizer,
            ) -> Quantizer:
                return kept or weight_quantizer(weight, spec, rule, inputs)

            found[name].append(
                block.quantize_linear(name, seen, input_quantizer=quantizer, weights=weights)
            )
    return found


def _rule(p: float, spec: QuantSpec, clip: str) -> Ranges | None:
    """The range rule of a percentile; None is the one that every method starts from."""
    if p == 1:
        return None
    if clip == "percentile":
        return percentile(p)
    start, inner = lp_minimal if spec.ranges == "lp" else minmax, percentile(p)

    def tighter(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        (lo, hi), (low, high) = start(groups, spec), inner(groups, spec)
        return torch.maximum(lo, low), torch.minimum(hi, high)

    return tighter


def _some_calls(block: Block, tokens: int) -> tuple[list[Call], list[Tensor]]:
    """About `tokens` tokens of calibration data, spread over the calls, and the float outputs."""
    outputs = block.float_outputs()
    # Multiples of the golden ratio, modulo one, spread evenly however many are taken.
    order = sorted(range(len(outputs)), key=lambda index: index * 0.6180339887498949 % 1)
    picked: list[int] = []
    for index in order:
        if sum(outputs[i].shape[:-1].numel() for i in picked) < tokens:
            picked.append(index)
    picked.sort()
    return [block.inputs[i] for i in picked], [outputs[i] for i in picked]


class _Enough(Exception):
    """Stops a forward pass once every watched linear has run."""


@contextmanager
def _watched(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of layers, and stops the pass when it has all."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            seen[name] = output
            if len(seen) == len(layers):
                raise _Enough

        return hook

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _put(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, layer)

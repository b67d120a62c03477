"""AWQ, activation-aware weight quantization (arXiv 2306.00978).

A few weight channels matter most: those that multiply large activations. AWQ protects them by
scaling before rounding (section 3.2; eq. 4 and 5):

    s* = argmin_s || Q(W diag(s)) (diag(s)^-1 X) - W X ||,    s = mean|X|^alpha,  alpha in [0, 1]

One alpha is searched on a grid per group of linears that read the same channels, against the
output of the module that holds them (attention, MLP, or the linear itself), and s is normalised by
sqrt(max s * min s). Then the range of every weight group is clipped to the ratio that loses least
of its share of the output; query and key keep theirs, since their error counts in a product. Both
as in the released code.

`scaling` says where s goes. "folded", AWQ as published: into the op before, which then hands out
x / s, so the activation quantizer sees tamer activations. "weight_only": it exists only around the
rounding of the weight, and activations are quantized as without AWQ.

Searches run with float activations by default, as published for weight-only quantization: that is
the AWQ which others compare with. `search_activations` quantizes activations in the search too.

Beyond the paper: candidates for a clipped range include the lp-minimal range that all methods
start from. And a block whose output error with weights and activations quantized ends up above that
of plain rounding stays with plain rounding (`fallback`), so that AWQ's block error is never above
RTN's. Channels that cannot be rescaled, such as those behind an activation function, get no scale.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.errors import UserError
from qvlm.methods.awq.clipping import clipped_quantizer
from qvlm.methods.awq.folding import Fold, find_folds
from qvlm.methods.base import MethodReport
from qvlm.quantization.block import Block, Call
from qvlm.quantization.calibration import Walk
from qvlm.quantization.linear import QuantLinear, folded_weight
from qvlm.quantization.quantizer import SMALLEST_SCALE, Quantizer, UniformQuantizer
from qvlm.quantization.ranges import minmax, weight_quantizer

SCALINGS = ("folded", "weight_only")
# Their outputs meet in a product before they reach the residual stream: not clipped.
UNCLIPPED = ("q_proj", "k_proj")
# The released code's floor of mean|x|: a channel without activity gets no extreme scale.
_LEAST_ACTIVITY = 1e-4


@dataclass(frozen=True)
class Choice:
    """The scale of one place.

    Attributes:
        scale: [fold.width].
        error: mean squared error of the readers' module with weights scaled and rounded.
        rtn_error: the same without scaling, which is plain rounding.
    """

    fold: Fold
    alpha: float
    scale: Tensor
    error: float
    rtn_error: float

    def record(self) -> dict[str, float]:
        """What a report says of it."""
        return {
            "alpha": round(self.alpha, 4),
            "error": self.error,
            "rtn_error": self.rtn_error,
        }


class AWQ:
    """Scaled and clipped weights.

    Args:
        scaling: "folded" or "weight_only".
        n_grid: values of alpha from 0 to 1; 1 tries only 0, which is no scaling.
        max_shrink: the most that a range may be clipped, as a share of it; 0 clips nothing.
        clip_grid: steps from the whole range to none, of which those up to `max_shrink` are tried.
        search_activations: whether activations are quantized during the searches.
        fallback: whether a block for which plain rounding is better gets that.

    Raises:
        UserError: for a value that is not accepted.
    """

    def __init__(
        self,
        scaling: str = "folded",
        n_grid: int = 20,
        max_shrink: float = 0.5,
        clip_grid: int = 20,
        search_activations: bool = False,
        fallback: bool = True,
    ) -> None:
        if scaling not in SCALINGS:
            raise UserError(f"method.scaling={scaling!r}: accepted are {', '.join(SCALINGS)}")
        for option, grid in (("n_grid", n_grid), ("clip_grid", clip_grid)):
            if isinstance(grid, bool) or not isinstance(grid, int) or grid < 1:
                raise UserError(f"method.{option}={grid!r}: accepted are whole numbers from 1")
        if not isinstance(max_shrink, int | float) or not 0 <= max_shrink < 1:
            raise UserError(
                f"method.max_shrink={max_shrink!r}: accepted are numbers from 0 to below 1"
            )
        for option, value in (("search_activations", search_activations), ("fallback", fallback)):
            if not isinstance(value, bool):
                raise UserError(f"method.{option}={value!r}: accepted are true and false")
        self.folded = scaling == "folded"
        self.alphas = [step / max(1, n_grid - 1) for step in range(n_grid)]
        self.clip_ratios = [1 - step / clip_grid for step in range(int(max_shrink * clip_grid))]
        self.search_activations = search_activations
        self.fallback = fallback
        notes = [] if self.folded else ["weight-only scaling"]
        notes += ["quantized search"] if search_activations else []
        self.name = f"AWQ ({', '.join(notes)})" if notes else "AWQ"

    def quantize(self, walk: Walk) -> MethodReport:
        """Scales, clips and replaces every linear, block by block.

        Returns:
            A report whose details say, per block, what was chosen behind each op, which linears
            are not scaled, the mean squared error of the block's output with weights and
            activations quantized beside RTN's on the same inputs, and which of both was kept.
        """
        seconds, candidates = 0.0, 0
        blocks: list[dict[str, Any]] = []
        for block in walk.blocks():
            start = time.perf_counter()
            tried, details = self._quantize_block(block)
            seconds += time.perf_counter() - start
            candidates += tried
            blocks.append(details)
        details = {"blocks": blocks, "uncalibrated": list(walk.uncalibrated)}
        return MethodReport(seconds, candidates, details)

    def _quantize_block(self, block: Block) -> tuple[int, dict[str, Any]]:
        """Replaces the block's linears; returns the number of candidates and what to record."""
        samples = block.linear_inputs()
        plain = {name: block.quantize_linear(name, x) for name, x in samples.items()}
        plain_error = _output_error(block, plain)
        for name in plain:
            block.restore(name)

        before = {key: value.clone() for key, value in block.module.state_dict().items()}
        choices = [
            self._choose_scale(block, fold, samples)
            for fold in find_folds(block)
            if any(len(samples[name]) for name in fold.readers)
        ]
        scales = {name: choice.scale for choice in choices for name in choice.fold.readers}
        if self.folded:
            for choice in choices:
                choice.fold.apply(block.module, choice.scale)
        layers = {
            name: self._quantize_linear(block, name, x, scales.get(name))
            for name, x in samples.items()
        }
        error = _output_error(block, layers)
        kept = "AWQ"
        if self.fallback and not error <= plain_error:
            for name in plain:
                block.restore(name)
            block.module.load_state_dict(before)
            for name, layer in plain.items():
                block.replace(name, layer)
            kept = "RTN"
        tried = len(self.alphas) * len(choices) + len(self.clip_ratios) * len(layers)
        return tried, {
            "block": block.name,
            "scales": {choice.fold.source: choice.record() for choice in choices},
            "unscaled": [name for name in layers if name not in scales],
            "error": error,
            "rtn_error": plain_error,
            "kept": kept,
        }

    def _choose_scale(self, block: Block, fold: Fold, samples: dict[str, Tensor]) -> Choice:
        """The alpha of the least output error (eq. 4 and 5); the smallest of equal ones."""
        activity = torch.cat([samples[name] for name in fold.readers]).abs().mean(0)
        module = block.module.get_submodule(_common_module(fold.readers))
        calls = _calls(block, module)
        target = block.run(module, calls)
        choices = []
        for alpha in self.alphas:
            scale = channel_scale(activity, alpha)
            with self._tried(block, fold, scale, samples):
                error = _mean_squared(block.run(module, calls), target)
            choices.append((error, alpha, scale))
        error, alpha, scale = min(choices, key=lambda choice: choice[0])
        return Choice(fold, alpha, scale, error, choices[0][0])

    @contextmanager
    def _tried(
        self, block: Block, fold: Fold, scale: Tensor, samples: dict[str, Tensor]
    ) -> Iterator[None]:
        """Lets the readers compute as if scaled and rounded, while the rest stays as it is.

        Nothing is folded yet: readers get x, and Q(W diag(s)) diag(s)^-1 for a weight.
        """
        saved, hooks = {}, []
        try:
            for name in fold.readers:
                linear = block.linears[name]
                weights, activations = block.spec(name)
                seen = scale if self.folded else torch.ones_like(scale)
                # Without activations in the search, what they do to the weight still counts: folded
                # scales, and clusters, which decide how weights are grouped.
                inputs: Quantizer | None = None
                if self.search_activations or activations.granularity == "per_channel":
                    inputs = block.input_quantizer(name, samples[name] / seen)
                elif activations.granularity == "per_channel_group":
                    inputs = block.input_quantizer(name, samples[name] / seen, minmax)
                weight = _as_multiplied(linear.weight * scale, inputs)
                rounded = weight_quantizer(weight, weights, inputs=inputs)(weight)
                saved[name] = linear.weight.data
                linear.weight.data = (rounded / (scale * _input_scale(inputs))).to(linear.weight)
                if inputs is not None and self.search_activations:
                    hooks.append(linear.register_forward_pre_hook(_quantizing(inputs, seen)))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for name, data in saved.items():
                block.linears[name].weight.data = data

    def _quantize_linear(
        self, block: Block, name: str, samples: Tensor, scale: Tensor | None
    ) -> QuantLinear:
        """The quantized linear with clipped weight ranges, after folding if that is how it goes.

        Args:
            samples: what the linear saw before any folding, [tokens, in].
            scale: of its input channels, [in]; None if they have none.
        """
        spec = block.spec(name)[0]
        one = torch.ones(samples.shape[1], device=samples.device)
        scale = one if scale is None else scale
        outside, within = (scale, one) if self.folded else (one, scale)
        samples = samples / outside
        inputs = block.input_quantizer(name, samples)
        seen = inputs(samples) if self.search_activations else samples
        seen = seen / (_input_scale(inputs) * within)
        clip = name.rpartition(".")[2] not in UNCLIPPED and len(samples) > 0
        ratios = self.clip_ratios if clip else ()

        def clipped(weight: Tensor) -> UniformQuantizer:
            quantizer = clipped_quantizer(weight * within, seen, spec, ratios, inputs)
            return quantizer if self.folded else _divided(quantizer, within)

        return block.quantize_linear(name, samples, input_quantizer=inputs, weights=clipped)


def channel_scale(activity: Tensor, alpha: float) -> Tensor:
    """mean|x|^alpha normalised to sqrt(max * min) = 1; [in] for mean|x| [in]. All ones for 0."""
    scale = activity.float().clamp_min(_LEAST_ACTIVITY).pow(alpha)
    return scale / (scale.max() * scale.min()).sqrt()


def _divided(quantizer: UniformQuantizer, scale: Tensor) -> UniformQuantizer:
    """The quantizer of W for one of W diag(s): the same integers, its scales divided by s.

    Each column then has a scale of its own, which a simulation can afford; an integer product
    would have to undo s on the way.
    """
    if quantizer.order is not None:
        scale = scale[quantizer.order]
    if quantizer.group_size is not None:
        scale = scale.view(-1, quantizer.group_size)
    scales = (quantizer.scale / scale).clamp_min(SMALLEST_SCALE)
    zero_points = quantizer.zero_point.expand(scales.shape).contiguous()
    return quantizer.with_scales(scales, zero_points)


def _input_scale(inputs: Quantizer | None) -> Tensor:
    """What a folding input quantizer moves into the weight; one for any other."""
    if isinstance(inputs, UniformQuantizer) and inputs.folds:
        return inputs.scale
    return torch.ones(())


def _as_multiplied(weight: Tensor, inputs: Quantizer | None) -> Tensor:
    return weight.detach().float() if inputs is None else folded_weight(weight, inputs)


def _quantizing(inputs: Quantizer, scale: Tensor) -> Callable[[nn.Module, Any], Any]:
    """A hook that quantizes a linear's input as x / s, and hands it on as x."""
    return lambda module, args: ((inputs(args[0] / scale) * scale).to(args[0]), *args[1:])


def _common_module(names: Sequence[str]) -> str:
    """The name of the innermost module that holds all of these; "" is the block."""
    common = names[0].split(".")
    for name in names[1:]:
        parts = name.split(".")
        same = [a == b for a, b in zip(common, parts, strict=False)]
        common = common[: same.index(False)] if False in same else common
    return ".".join(common)


def _calls(block: Block, module: nn.Module) -> list[Call]:
    """The calls that reach a module of the block when it runs on its inputs."""
    calls: list[Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    hook = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        block.run()
    finally:
        hook.remove()
    return calls


def _output_error(block: Block, layers: dict[str, QuantLinear]) -> float:
    """The mean squared error of the block's output with these layers, which stay in place."""
    target = block.float_outputs()
    for name, layer in layers.items():
        block.replace(name, layer)
    return _mean_squared(block.run(), target)


def _mean_squared(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    """0 for no outputs at all."""
    total = sum(
        float((output.double() - target.double()).square().sum())
        for output, target in zip(outputs, targets, strict=True)
    )
    return total / max(1, sum(target.numel() for target in targets))

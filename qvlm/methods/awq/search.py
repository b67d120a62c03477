"""The search of AWQ's scales (arXiv 2306.00978, section 3.2; eq. 4 and 5).

    s* = argmin_s || Q(W diag(s)) (diag(s)^-1 X) - W X ||,    s = mean|X|^alpha,  alpha in [0, 1]

One alpha is chosen from a grid for each group of linears that read the same channels, by the error
of the output of the innermost module that contains them and is called: attention, MLP, or the
linear itself. (The list of a mixture's experts contains their linears and is never called.) s is
normalized by sqrt(max s * min s), as in the released code (llm-awq), which takes alpha = i / 20 for
i = 0 .. 19. The grid here includes both ends, 0 and 1.

Nothing is folded during the search: the linears that read the channels get x, and
Q(W diag(s)) diag(s)^-1 as their weight.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.methods.awq.rescaling import Rescaling
from qvlm.methods.objective import mean_squared_error
from qvlm.quantization.block import Block
from qvlm.quantization.calls import Call
from qvlm.quantization.hooks import hooked
from qvlm.quantization.linear import folded_weight
from qvlm.quantization.precision import settled, wide
from qvlm.quantization.quantizer import Quantizer, UniformQuantizer
from qvlm.quantization.ranges import minmax, weight_quantizer

# The released code's lower bound of mean|x|, so that a silent channel gets no extreme scale.
_LEAST_ACTIVITY = 1e-4


@dataclass(frozen=True)
class ChosenScale:
    """The scale that the search chose for one `Rescaling`.

    Attributes:
        rescaling: Channels that are scaled.
        alpha: Exponent of the scale, from 0 to 1.
        scale: Scale of each channel, [rescaling.width].
        error: Mean squared error of the searched module's output with scaled and rounded weights.
        rtn_error: The same error without scaling, which is that of plain rounding.
    """

    rescaling: Rescaling
    alpha: float
    scale: Tensor
    error: float
    rtn_error: float

    def record(self) -> dict[str, Any]:
        """The entry of this choice in a report."""
        return {
            "alpha": round(self.alpha, 4),
            "error": self.error,
            "rtn_error": self.rtn_error,
        }


@dataclass(frozen=True)
class ScaleSearch:
    """The search of alpha.

    Args:
        alphas: Grid of exponents. The first one is 0, which is no scaling.
        folded: Whether the activation quantizer gets x / s; otherwise it gets x.
        quantize_inputs: Whether the search quantizes the inputs of the linears too.
        reference: Whether weights are rounded with min-max ranges, and a scale is bounded from
            below after its power is taken, as in llm-awq.
    """

    alphas: Sequence[float]
    folded: bool
    quantize_inputs: bool
    reference: bool = False

    def choose(self, block: Block, rescaling: Rescaling, samples: dict[str, Tensor]) -> ChosenScale:
        """Chooses the alpha of the least output error; of equal ones, the smallest.

        Args:
            block: Block with its float linears.
            rescaling: Channels to be scaled.
            samples: What each linear of the block read, [tokens, in].
        """
        activity = torch.cat([samples[name] for name in rescaling.readers]).abs().mean(0)
        module, calls = _called_module(block, rescaling.readers)
        target = block.run(module, calls)
        tried = []
        for alpha in self.alphas:
            scale = channel_scale(activity, alpha, self.reference)
            with self._scaled(block, rescaling, scale, samples):
                error = mean_squared_error(block.run(module, calls), target)
            tried.append((error, alpha, scale))
        error, alpha, scale = min(tried, key=lambda entry: entry[0])
        return ChosenScale(rescaling, alpha, scale, error, tried[0][0])

    @contextmanager
    def _scaled(
        self, block: Block, rescaling: Rescaling, scale: Tensor, samples: dict[str, Tensor]
    ) -> Iterator[None]:
        """Makes the readers compute with scaled and rounded weights while the context is open."""
        weights: dict[str, Tensor] = {}
        quantizing: dict[nn.Module, Callable[..., Any]] = {}
        seen_scale = scale if self.folded else torch.ones_like(scale)
        for name in rescaling.readers:
            linear = block.linears[name]
            weight_spec, input_spec = block.spec(name)
            # Even if inputs are not quantized in the search, their quantizer affects the weight:
            # by its folded scales, and by its clusters, which decide how weights are grouped.
            inputs: Quantizer | None = None
            if self.quantize_inputs or input_spec.granularity == "per_channel":
                inputs = block.input_quantizer(name, samples[name] / seen_scale)
            elif input_spec.granularity == "per_channel_group":
                inputs = block.input_quantizer(name, samples[name] / seen_scale, minmax)
            weight = settled((linear.weight * scale).detach()).to(wide(linear.weight).dtype)
            if inputs is not None:
                weight = folded_weight(weight, inputs)
            estimator = minmax if self.reference else None
            rounded = weight_quantizer(weight, weight_spec, estimator, inputs)(weight)
            weights[name] = (rounded / (scale * input_scale(inputs))).to(linear.weight)
            if inputs is not None and self.quantize_inputs:
                quantizing[linear] = _quantizing(inputs, seen_scale)
        before = {name: block.linears[name].weight.data for name in weights}
        try:
            for name, weight in weights.items():
                block.linears[name].weight.data = weight
            with hooked(quantizing):
                yield
        finally:
            for name, weight in before.items():
                block.linears[name].weight.data = weight


def channel_scale(activity: Tensor, alpha: float, reference: bool = False) -> Tensor:
    """Computes mean|x|^alpha, normalized so that sqrt(max * min) = 1; all ones for alpha 0.

    Args:
        activity: mean|x| of each channel, [in].
        alpha: Exponent, from 0 to 1.
        reference: Whether the power is bounded from below, as in llm-awq, instead of mean|x|.

    Returns:
        Scale of each channel, [in] float32.
    """
    activity = settled(activity).double()
    if reference:
        scale = activity.pow(alpha).clamp_min(_LEAST_ACTIVITY)
    else:
        scale = activity.clamp_min(_LEAST_ACTIVITY).pow(alpha)
    return settled(scale / (scale.max() * scale.min()).sqrt())


def input_scale(inputs: Quantizer | None) -> Tensor:
    """The scale [in] that an input quantizer folds into the weight; one if it folds none."""
    if isinstance(inputs, UniformQuantizer) and inputs.folds:
        return inputs.scale
    return torch.ones(())


def _quantizing(inputs: Quantizer, scale: Tensor) -> Callable[[nn.Module, Any], Any]:
    """A hook that quantizes a linear's input as x / s and passes it on as x."""
    return lambda module, args: ((inputs(args[0] / scale) * scale).to(args[0]), *args[1:])


def _called_module(block: Block, names: Sequence[str]) -> tuple[nn.Module, list[Call]]:
    """The innermost module that contains all these linears and is called when the block runs.

    Returns:
        The module, and its calls on the block's inputs.
    """
    parts = [name.split(".") for name in names]
    shared = [
        level[0] for level in takewhile(lambda level: len({*level}) == 1, zip(*parts, strict=False))
    ]
    around = [block.module.get_submodule(".".join(shared[:end])) for end in range(len(shared) + 1)]
    calls: dict[nn.Module, list[Call]] = {module: [] for module in around}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module].append((args, kwargs))

    with hooked(dict.fromkeys(around, note), with_kwargs=True):
        block.run()
    return next((module, calls[module]) for module in reversed(around) if calls[module])

"""One step of a calibration walk: what a method sees of the model, and how it changes it.

A block knows its inputs and its float linears and offers what a search needs: run the block as it
is, get the float block's outputs to compare with, put a quantized linear in, take it out again.
The defaults that all methods share (`input_quantizer`, `quantize_linear`) are here too, so that a
method says only where it differs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.errors import RunError
from qvlm.quantization.linear import QuantLinear, folded_weight
from qvlm.quantization.quantizer import Quantizer
from qvlm.quantization.ranges import Ranges, activation_quantizer, weight_quantizer
from qvlm.quantization.spec import QuantizationConfig, QuantSpec
from qvlm.quantization.targets import quantizable

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call of a block: those of one calibration batch."""

MAX_TOKENS = 4096


class Block:
    """One step of the walk: a vision layer, the projector, a decoder layer, or a run of layers.

    Attributes:
        name: full name in the model; "first..last" for a run of layers.
        kind: "vision", "projector" or "language".
        module: the block itself, part of the model.
        linears: its float linears that are to be quantized, by name relative to `module`, in the
            order in which the calibration data reaches them; those it never reaches come last.
        inputs: one call per calibration batch that reaches the block (batches without an image
            reach neither vision layers nor projector), computed by the quantized model so far.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        kind: str,
        inputs: list[Call],
        quantization: QuantizationConfig,
        uncalibrated: list[str],
    ) -> None:
        """A walk makes blocks; `uncalibrated` is its list, which the block adds to."""
        names = list(layers)
        self.name = names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"
        self.kind = kind
        self.module = next(iter(layers.values())) if len(names) == 1 else Chain(layers.values())
        self.inputs = inputs
        self.linears = self._in_execution_order()
        self._layer_names = names
        self._quantization = quantization
        self._uncalibrated = uncalibrated
        self._float_outputs: list[Tensor] | None = None

    def run(self, module: nn.Module | None = None, calls: list[Call] | None = None) -> list[Tensor]:
        """Outputs [batch, tokens, features] of the block as it is now, one per call.

        Args:
            module: another module to run instead of the block.
            calls: other inputs than `inputs`.
        """
        return run_calls(
            self.module if module is None else module, self.inputs if calls is None else calls
        )

    def float_outputs(self) -> list[Tensor]:
        """Outputs of the block with its float linears on `inputs`; computed once, then kept.

        Linears replaced by then are put aside for the run. Anything else that a method changes
        (norms, say) has to keep the float block's function, or to be changed after this call.
        """
        if self._float_outputs is None:
            replaced = {name: self.module.get_submodule(name) for name in self.linears}
            try:
                for name in replaced:
                    self.restore(name)
                self._float_outputs = self.run()
            finally:
                for name, layer in replaced.items():
                    self._put(name, layer)
        return self._float_outputs

    def linear_inputs(self, max_tokens: int | None = MAX_TOKENS) -> dict[str, Tensor]:
        """What each linear sees when the block, as it is now, runs on its inputs.

        An expert sees the tokens routed to it, perhaps none.

        Args:
            max_tokens: about how many to keep per linear, spread evenly over every batch; None
                keeps all.

        Returns:
            [tokens, in] per linear, in the order of `linears`.
        """
        share = None if max_tokens is None else -(-max_tokens // max(1, len(self.inputs)))
        seen: dict[str, list[Tensor]] = {name: [] for name in self.linears}

        def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                seen[name].append(_spread(args[0].detach().flatten(0, -2), share))

            return hook

        hooks = [
            self.module.get_submodule(name).register_forward_pre_hook(keep(name))
            for name in self.linears
        ]
        try:
            for call in self.inputs:
                run_calls(self.module, [call])
        finally:
            for hook in hooks:
                hook.remove()
        return {
            name: torch.cat(parts)
            if parts
            else self.linears[name].weight.new_empty(0, self.linears[name].in_features)
            for name, parts in seen.items()
        }

    def layer_name(self, name: str) -> str:
        """The full name in the model of a linear of this block."""
        if len(self._layer_names) == 1:
            return f"{self.name}.{name}"
        index, _, rest = name.partition(".")
        return f"{self._layer_names[int(index)]}.{rest}"

    def spec(self, name: str) -> tuple[QuantSpec, QuantSpec]:
        """The specs of a linear's weight and of its input."""
        return self._quantization.weight, self._quantization.activation(self.kind)

    def input_quantizer(
        self, name: str, samples: Tensor, ranges: Ranges | None = None
    ) -> Quantizer:
        """The shared default for a linear's input, from the samples [tokens, in] that it saw.

        A linear without samples gets a per-token quantizer of the same bits, and the weight-only
        ranges of its weight; it is named in `Walk.uncalibrated`.

        Raises:
            RunError: naming the layer, if a sample is not finite.
        """
        layer = self.layer_name(name)
        if not bool(torch.isfinite(samples).all()):
            raise RunError(f"the input of {layer} is not finite during calibration")
        if len(samples) == 0 and layer not in self._uncalibrated:
            self._uncalibrated.append(layer)
        return activation_quantizer(samples, self.spec(name)[1], ranges)

    def quantize_linear(
        self,
        name: str,
        samples: Tensor,
        *,
        input_quantizer: Quantizer | None = None,
        weights: Callable[[Tensor], Quantizer] | None = None,
        keep_float: bool = False,
    ) -> QuantLinear:
        """The quantized form of a linear; the block is left as it is (see `replace`).

        Args:
            samples: what the linear saw, [tokens, in].
            input_quantizer: instead of the shared default.
            weights: makes the quantizer of the weight to be quantized [out, in], instead of the
                default of the weight spec.
            keep_float: see `QuantLinear`.

        Raises:
            RunError: naming the layer, if its weight or a sample is not finite.
        """
        linear = self.linears[name]
        layer = self.layer_name(name)
        if not bool(torch.isfinite(linear.weight).all()):
            raise RunError(f"the weight of {layer} is not finite")
        inputs = input_quantizer or self.input_quantizer(name, samples)
        weight = folded_weight(linear.weight, inputs)
        if weights:
            quantizer = weights(weight)
        else:
            quantizer = weight_quantizer(weight, self.spec(name)[0], inputs=inputs)
        return QuantLinear.from_linear(linear, quantizer, inputs, keep_float, layer)

    def replace(self, name: str, layer: QuantLinear) -> None:
        """Puts a quantized linear in the place of a linear."""
        layer.layer_name = self.layer_name(name)
        self._put(name, layer)

    def restore(self, name: str) -> None:
        """Puts the float linear back."""
        self._put(name, self.linears[name])

    def close(self) -> None:
        """Lets go of activations and float linears; the walk calls it when it moves on."""
        self.inputs, self._float_outputs, self.linears = [], None, {}

    def _put(self, name: str, layer: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.module.get_submodule(parent), child, layer)

    def _in_execution_order(self) -> dict[str, nn.Linear]:
        linears = quantizable(self.module)
        reached: dict[str, None] = {}

        def mark(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                reached[name] = None

            return hook

        hooks = [linear.register_forward_pre_hook(mark(name)) for name, linear in linears.items()]
        try:
            for call in self.inputs:
                run_calls(self.module, [call])
                if len(reached) == len(linears):
                    break
        finally:
            for hook in hooks:
                hook.remove()
        unreached = [name for name in linears if name not in reached]
        return {name: linears[name] for name in [*reached, *unreached]}


class Chain(nn.ModuleList):
    """Consecutive layers that all take the same further arguments, as one block."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the layers one after the other on hidden states [batch, tokens, features]."""
        for layer in self:
            hidden_states = _hidden(layer(hidden_states, *args, **kwargs))
        return hidden_states


@torch.no_grad()
def run_calls(module: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    """The hidden states that a module returns for each of its calls."""
    return [_hidden(module(*args, **kwargs)) for args, kwargs in calls]


def advance(module: nn.Module, calls: list[Call]) -> list[Call]:
    """The next layer's calls: the same with this layer's outputs for hidden states.

    Empties `calls` on the way, so that old and new activations are not all held at once.
    """
    following: list[Call] = []
    while calls:
        args, kwargs = calls.pop(0)
        output = run_calls(module, [(args, kwargs)])[0]
        if args:
            following.append(((output, *args[1:]), kwargs))
        else:
            following.append(((), {**kwargs, "hidden_states": output}))
    return following


def _spread(tokens: Tensor, count: int | None) -> Tensor:
    """About evenly spaced `count` rows of [tokens, features], copied so that the rest is freed."""
    if count is None or len(tokens) <= count:
        return tokens.clone()
    rows = torch.linspace(0, len(tokens) - 1, count, dtype=torch.float64, device=tokens.device)
    return tokens[rows.long()]


def _hidden(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The hidden states of a layer that returns them alone or first in a tuple."""
    return outputs[0] if isinstance(outputs, tuple) else outputs

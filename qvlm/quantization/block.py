"""A block: one step of a calibration walk, as a method sees and changes it.

A block has its inputs and its float linears, and offers what a search needs: run the block as it
is, compute the float block's outputs to compare with, put a quantized linear in, take it out again.
The defaults that all methods share (`input_quantizer`, `quantize_linear`) are here too, so that a
method only states where it differs.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.errors import RunError, UserError
from qvlm.quantization.calls import Call, Chain, run_calls
from qvlm.quantization.first_token import FirstToken
from qvlm.quantization.hadamard import hadamard_transform
from qvlm.quantization.hooks import hooked
from qvlm.quantization.linear import QuantLinear, folded_weight
from qvlm.quantization.precision import settled
from qvlm.quantization.quantizer import Quantizer
from qvlm.quantization.ranges import RangeEstimator, activation_quantizer, weight_quantizer
from qvlm.quantization.sampling import evenly_spaced
from qvlm.quantization.spec import QuantizationConfig, QuantSpec
from qvlm.quantization.targets import quantizable

MAX_TOKENS = 4096


class Block:
    """One step of the walk: a vision layer, the projector, a decoder layer, or several layers.

    Attributes:
        name: Full name in the model, or "first..last" for several layers.
        kind: "vision", "projector" or "language".
        module: Module of the block, which is part of the model.
        linears: Float linears that are to be quantized, by name relative to `module`, in the order
            in which calibration data reaches them. Those that it never reaches come last.
        inputs: Calls of the block, computed by the model as it is quantized so far. There is one
            per calibration batch that reaches the block: batches without an image reach neither
            vision layers nor projector.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        kind: str,
        inputs: list[Call],
        quantization: QuantizationConfig,
        uncalibrated: list[str],
        first_token: FirstToken | None = None,
    ) -> None:
        """Called by a walk; the block appends to the walk's list `uncalibrated`."""
        names = list(layers)
        self.name = names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"
        self.kind = kind
        self.module = next(iter(layers.values())) if len(names) == 1 else Chain(layers.values())
        self.inputs = inputs
        self.linears = self._in_execution_order()
        self._layer_names = names
        self._quantization = quantization
        self._uncalibrated = uncalibrated
        self._first_token = first_token if kind == "language" else None
        self._float_outputs: list[Tensor] | None = None
        self._positions = self._number_of_positions()

    def run(self, module: nn.Module | None = None, calls: list[Call] | None = None) -> list[Tensor]:
        """Runs the block as it is now.

        Args:
            module: Module to run instead of the block's own.
            calls: Calls to run instead of `inputs`.

        Returns:
            Outputs [batch, tokens, features], one per call.
        """
        return run_calls(
            self.module if module is None else module, self.inputs if calls is None else calls
        )

    def float_outputs(self) -> list[Tensor]:
        """Outputs of the block with its float linears on `inputs`, computed once and kept.

        Linears that are replaced already are taken out for the run. A method that changes anything
        else (a norm, for example) has to preserve the function of the float block, or to make the
        change after the first call of this.
        """
        if self._float_outputs is None:
            replaced = {name: self.module.get_submodule(name) for name in self.linears}
            try:
                for name in replaced:
                    self.restore(name)
                self._float_outputs = self.run()
            finally:
                for name, layer in replaced.items():
                    self.module.set_submodule(name, layer)
        return self._float_outputs

    def linear_inputs(self, max_tokens: int | None = MAX_TOKENS) -> dict[str, Tensor]:
        """Collects what each linear reads when the block, as it is now, runs on its inputs.

        An expert reads the tokens that are routed to it, perhaps none.

        Args:
            max_tokens: Approximate number of tokens to keep per linear, evenly spaced in every
                batch. None keeps all.

        Returns:
            Samples [tokens, in] of each linear, in the order of `linears`. They have the type of
            the model and, if that is float64, values rounded to float32.
        """
        share = None if max_tokens is None else -(-max_tokens // max(1, len(self.inputs)))
        seen: dict[str, list[Tensor]] = {name: [] for name in self.linears}

        def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                tokens = args[0].detach().flatten(0, -2)
                if (first := self.first_positions(args[0])) is not None:
                    tokens = tokens[~first]
                # Indexing copies, so that the tokens that are not kept can be freed.
                kept = tokens[self.kept_tokens(tokens, len(tokens) if share is None else share)]
                seen[name].append(settled(kept).to(kept.dtype))

            return hook

        with hooked({self.module.get_submodule(name): keep(name) for name in self.linears}):
            for call in self.inputs:
                run_calls(self.module, [call])
        return {
            name: torch.cat(parts)
            if parts
            else self.linears[name].weight.new_empty(0, self.linears[name].in_features)
            for name, parts in seen.items()
        }

    def kept_tokens(self, tokens: Tensor, count: int) -> Tensor:
        """Chooses the tokens of one call to calibrate on: evenly spaced ones.

        Where ranges are those of positions, they are the tokens of evenly spaced sequences.

        Args:
            tokens: Input of a linear, [tokens, features].
            count: Approximate number of tokens to keep.

        Returns:
            Ascending indices of tokens.
        """
        length = self._positions or 1
        sequences = evenly_spaced(len(tokens) // length, -(-count // length), tokens.device)
        inner = torch.arange(length, device=tokens.device)
        return (sequences[:, None] * length + inner).flatten()

    def first_positions(self, x: Tensor) -> Tensor | None:
        """Says which tokens of a linear's input stay in floating point while the block runs.

        Args:
            x: Input of a linear, [sequences, tokens, features], or [tokens, features] in an expert.

        Returns:
            Mask [sequences * tokens] of tokens that are not to be calibrated on; None for none.
        """
        rows = None if self._first_token is None else self._first_token.rows(x)
        return None if rows is None else rows.flatten()

    def layer_name(self, name: str) -> str:
        """The full name in the model of a linear of this block."""
        if len(self._layer_names) == 1:
            return f"{self.name}.{name}"
        index, _, rest = name.partition(".")
        return f"{self._layer_names[int(index)]}.{rest}"

    def spec(self, name: str) -> tuple[QuantSpec, QuantSpec]:
        """The specs of a linear's weight and of its input, with numbers as group sizes."""
        width = self.linears[name].in_features
        specs = self._quantization.weights(self.kind), self._quantization.activation(self.kind)
        inputs = replace(specs[1].for_layer(name, width), positions=self._positions)
        return specs[0].for_width(width), inputs

    def input_quantizer(
        self, name: str, samples: Tensor, estimator: RangeEstimator | None = None
    ) -> Quantizer:
        """Makes the quantizer of a linear's input that all methods share by default.

        A linear without samples gets a per-token quantizer of the same bits, and its name is added
        to `Walk.uncalibrated`.

        Args:
            name: Name of the linear in the block.
            samples: What the linear read, [tokens, in].
            estimator: Range estimator. By default, the one that the spec names.

        Raises:
            RunError: If a sample is not finite; the message names the layer.
        """
        layer = self.layer_name(name)
        if not bool(torch.isfinite(samples).all()):
            raise RunError(f"the input of {layer} is not finite during calibration")
        if len(samples) == 0 and layer not in self._uncalibrated:
            self._uncalibrated.append(layer)
        return activation_quantizer(samples, self.spec(name)[1], estimator)

    def quantize_linear(
        self,
        name: str,
        samples: Tensor,
        *,
        input_quantizer: Quantizer | None = None,
        weights: Callable[[Tensor], Quantizer] | None = None,
        keep_float: bool = False,
        hadamard: bool = False,
    ) -> QuantLinear:
        """Quantizes a linear and leaves the block as it is (see `replace`).

        Args:
            name: Name of the linear in the block.
            samples: What the linear read, [tokens, in].
            input_quantizer: Quantizer of the input, instead of the shared default.
            weights: Function from the weight to be quantized [out, in] to its quantizer, instead
                of the default of the weight spec.
            keep_float: See `QuantLinear`.
            hadamard: Whether the layer transforms its input by a Hadamard matrix. An
                `input_quantizer` is then that of the transformed input.

        Raises:
            RunError: If the weight or a sample is not finite; the message names the layer.
        """
        linear = self.linears[name]
        layer = self.layer_name(name)
        if not bool(torch.isfinite(linear.weight).all()):
            raise RunError(f"the weight of {layer} is not finite")
        if input_quantizer is None and hadamard:
            samples = hadamard_transform(samples)
        inputs = input_quantizer or self.input_quantizer(name, samples)
        weight = folded_weight(linear.weight, inputs, hadamard)
        if weights:
            quantizer = weights(weight)
        else:
            quantizer = weight_quantizer(weight, self.spec(name)[0], inputs=inputs)
        quantized = QuantLinear.from_linear(linear, quantizer, inputs, keep_float, layer, hadamard)
        quantized.first_token = self._first_token
        return quantized

    def replace(self, name: str, layer: QuantLinear) -> None:
        """Puts a quantized linear in the place of a linear."""
        layer.layer_name = self.layer_name(name)
        layer.first_token = self._first_token
        self.module.set_submodule(name, layer)

    def restore(self, name: str) -> None:
        """Puts the float linear back."""
        self.module.set_submodule(name, self.linears[name])

    def close(self) -> None:
        """Frees activations and float linears; the walk calls it when it moves on."""
        self.inputs, self._float_outputs, self.linears = [], None, {}

    def _number_of_positions(self) -> int | None:
        """Number of tokens of every sequence, if ranges are those of positions."""
        if self._quantization.activation(self.kind).granularity != "per_position":
            return None
        hidden = [args[0] if args else kwargs["hidden_states"] for args, kwargs in self.inputs]
        lengths = {x.shape[1] if x.ndim == 3 else None for x in hidden}
        if len(lengths) > 1 or None in lengths:
            raise UserError(
                f"quantizer.vision.granularity=per_position is not possible for {self.name}, which "
                "does not read as many tokens of every image. Choose one of: per_tensor, per_token"
            )
        return lengths.pop() if lengths else None

    def _in_execution_order(self) -> dict[str, nn.Linear]:
        linears = quantizable(self.module)
        reached: dict[str, None] = {}

        def mark(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                reached[name] = None

            return hook

        with hooked({linear: mark(name) for name, linear in linears.items()}):
            for call in self.inputs:
                run_calls(self.module, [call])
                if len(reached) == len(linears):
                    break
        unreached = [name for name in linears if name not in reached]
        return {name: linears[name] for name in [*reached, *unreached]}

"""Switches single linears of a quantized model between quantized and floating point.

A method may change the float model before it rounds it, by rescaling or rotating channels. The
float linears that are kept here are therefore those that it rounded, and the float model is what
they make of the changed one. Both are in memory at once.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qvlm.cell.walk import ProgressWalk
from qvlm.quantization import Block, QuantLinear, folded_weight
from qvlm.quantization.first_token import FirstToken
from qvlm.tables.sensitivity.parts import ACTIVATIONS, BOTH, WEIGHTS


class KeepingWalk(ProgressWalk):
    """A walk that keeps the float linears of the blocks that it leaves.

    Attributes:
        floats: Float linears by full name, as they were when the walk left their block.
    """

    def __init__(self, *args: object) -> None:
        """Takes the arguments of `Walk`."""
        super().__init__(*args)  # type: ignore[arg-type]
        self.floats: dict[str, nn.Linear] = {}

    def blocks(self, partition: Sequence[Sequence[str]] | None = None) -> Iterator[Block]:
        """Yields the blocks in execution order; see `Walk.blocks`."""
        for block in super().blocks(partition):
            yield block
            named = {block.layer_name(name): linear for name, linear in block.linears.items()}
            self.floats.update(named)


class EveryToken(FirstToken):
    """Leaves every position in floating point, and not only the first one."""

    def __init__(self) -> None:
        super().__init__({})

    def rows(self, x: Tensor) -> Tensor:
        """Returns a mask [...] of true for an input [..., features]."""
        return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)


@contextmanager
def quantized_only(
    model: nn.Module, floats: Mapping[str, nn.Linear], names: Collection[str], operands: str = BOTH
) -> Iterator[None]:
    """Leaves only some of a model's linears quantized while the context is open.

    Args:
        model: Model whose linears `floats` are all quantized.
        floats: Float linears by full name.
        names: Full names of the linears that stay quantized.
        operands: Which operands of these linears stay so: `BOTH`, `WEIGHTS` or `ACTIVATIONS`.
    """
    layers = {name: model.get_submodule(name) for name in floats}
    try:
        for name, layer in layers.items():
            assert isinstance(layer, QuantLinear)
            kept = _with_operands(layer, floats[name], operands) if name in names else floats[name]
            model.set_submodule(name, kept)
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


def _with_operands(layer: QuantLinear, linear: nn.Linear, operands: str) -> QuantLinear:
    """The layer itself, or one that multiplies the same numbers but for one float operand."""
    if operands == BOTH:
        return layer
    weight = layer.quantized_weight()
    if operands == ACTIVATIONS:
        weight = folded_weight(linear.weight, layer.input_quantizer, layer.hadamard)
    quantizers = layer.weight_quantizer, layer.input_quantizer
    other = QuantLinear(weight, layer.bias, *quantizers, layer.layer_name, layer.hadamard)
    other.first_token = EveryToken() if operands == WEIGHTS else layer.first_token
    return other

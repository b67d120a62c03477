"""The first position of a sequence in floating point, because it has activations like no other.

LLaMAs put "massive activations" (arXiv 2402.17762) on the first token: a few channels that are
thousands of times larger than the median. A static range that contains them leaves one level to all
other tokens, and a range without them clips what the attention of every later token relies on.

With `first_token="float"` the inputs of the decoder's linears stay in floating point at the first
position and are not calibrated on. Weights are quantized for all positions. The cost is not
nothing: a model in 4 bits would need a second path for that position. Since the first token is
always the same, its keys and values could instead be computed once and kept as a prefix. Neither is
built in packed execution, which refuses the option. What each is worth is measured in simulation.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.errors import RunError


class FirstToken:
    """Knows, while a decoder layer runs, which of its positions are the first of their sequence.

    Attributes:
        mask: Whether a position is the first, [1 or sequences, tokens]; None outside of a layer
            that was given positions.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        """Registers hooks that stay on the decoder layers."""
        self.mask: Tensor | None = None
        for layer in layers.values():
            layer.register_forward_pre_hook(self._enter, with_kwargs=True)
            layer.register_forward_hook(self._leave, always_call=True)

    def rows(self, x: Tensor) -> Tensor | None:
        """Returns which tokens of an input are first positions.

        Args:
            x: Input of a linear, [sequences, tokens, features].

        Returns:
            Mask [sequences, tokens], or None if nothing is known or `x` has another form, as the
            tokens of an expert have.
        """
        if self.mask is None or x.ndim != 3 or self.mask.shape[-1] != x.shape[1]:
            return None
        return self.mask.expand(x.shape[:2])

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions = kwargs.get("position_ids")
        if positions is None:
            raise RunError(
                f"a {type(layer).__name__} is not told the positions of its tokens, so the first "
                "cannot stay in floating point. Give quantizer.first_token=quantized."
            )
        self.mask = positions == 0

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.mask = None


def with_first_in_float(
    quantized: Tensor, x: Tensor, unit: Tensor | None, first: FirstToken | None
) -> Tensor:
    """Puts the first positions of an input back into floating point.

    Args:
        quantized: Quantized input [..., features], in units of `unit` if there is one.
        x: The input itself, [..., features].
        unit: Scale of each channel that was folded into the weight, [features], or None.
        first: Knowledge of first positions; None changes nothing.
    """
    rows = None if first is None else first.rows(x)
    if rows is None:
        return quantized
    exact = x.to(quantized) if unit is None else x.to(quantized) / unit
    return torch.where(rows[..., None], exact, quantized)

"""What kernels share to bound their rounding errors; `bounds.py` derives the whole bound."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from qvlm.packing.layer import PackedLinear

# Unit roundoff, the largest relative error of rounding to a type.
FLOAT32_ROUNDOFF = 2.0**-24
BF16_ROUNDOFF = 2.0**-8


def float32_share(layer: PackedLinear) -> float:
    """Returns the share of a sum of absolute values that two sums in float32 may round off."""
    return 2 * (layer.in_features + 6) * FLOAT32_ROUNDOFF


def bf16_operands(magnitude: Tensor) -> Tensor:
    """Bounds the error of rounding input, weight and output to bf16 once each.

    Args:
        magnitude: Sums of absolute values of the products, [rows, out].
    """
    return 3 * BF16_ROUNDOFF * magnitude


def quantized_magnitude(layer: PackedLinear, x: Tensor) -> Tensor:
    """Returns |x_hat| of an input [..., in] in float64, [rows, in], channels in their own order."""
    steps, scale, _ = layer.input_steps(x.reshape(-1, layer.in_features))
    return (steps * scale).double().abs()

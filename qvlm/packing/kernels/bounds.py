"""How far apart the outputs of a packed layer and of the simulated layer can be.

Both are sums of K products t c d v s in float32, whose unit roundoff is u = 2^-24. At most these
are rounded: x_hat twice, w_hat once, each product once, K additions, the scale of the token and the
bias. That is (K + 6) u of the sum of absolute values, once for the packed output and once for the
simulated one. Kernels that sum integers round less often:

- `int_mm` sums each run of channels exactly. For a run it rounds, in float32, the conversion of
  the sum, two factors and the addition, and in float64 the output alone.
- `native` adds exact sums of runs, as `int_mm` does. Where it dequantizes
  the weight it rounds as the simulation does, or, for an input in bf16, as `bf16`.
- `triton` sums t v over a tile, a unit of codes, or a chunk exactly: such a sum is at most 2^24,
  which float32 holds. Each sum is multiplied by s and added, fused or not and in any order, which
  are at most K roundings of both; then d and the bias are rounded once each. NormalFloat rounds as
  `bf16` where a stock product multiplies, which is for more than a few rows.

What a kernel rounds beyond that, to bf16, is its `extra_error`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qvlm.packing.kernels import kernel_named
from qvlm.packing.kernels.rounding import float32_share, quantized_magnitude

if TYPE_CHECKING:
    from qvlm.packing.layer import PackedLinear


@torch.no_grad()
def accumulation_bound(layer: PackedLinear, x: Tensor, kernel: str) -> Tensor:
    """Bounds how far a packed output may lie from the simulated one, before a cast to the model.

    A factor of 1.01 covers products of errors, and a tiny number those that are lost below the
    normal range.

    Args:
        layer: Packed layer.
        x: Finite input, [rows, in].
        kernel: Name of a kernel that serves the layer.

    Returns:
        Largest absolute difference of each output, [rows, out] float64.
    """
    magnitude = quantized_magnitude(layer, x) @ layer.dequantized().double().abs().T
    if layer.bias is not None:
        magnitude += layer.bias.view(torch.float32).double().abs()
    bound = float32_share(layer) * magnitude
    return 1.01 * (bound + kernel_named(kernel).extra_error(layer, x, magnitude)) + 1e-36

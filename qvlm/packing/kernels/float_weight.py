"""What kernels share that dequantize a weight piece by piece and multiply floats."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from qvlm.packing.layer import PackedLinear

# Weights that are dequantized at a time, which bounds the memory of a call.
PIECE = 2**22


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dequantizes a uniform weight.

    Args:
        codes: Codes, [out, in] uint8.
        scale, zero_point: Parameters of each group, [out, groups] float32.
        group_size: Number of neighboring channels in a group; the last group may be smaller.
        dtype: Float64 for products without a rounding; any other type stands for float32.

    Returns:
        Weight in float64 or float32, [out, in].
    """
    width = codes.shape[1]
    groups = F.pad(codes, (0, -width % group_size)).unflatten(1, (-1, group_size))
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    values = (groups - zero_point[..., None]).to(exact).mul_(scale[..., None])
    return values.flatten(1)[:, :width]


def pieces(rows: int, width: int) -> list[slice]:
    """Cuts the rows of a weight [rows, width] into runs of at most `PIECE` weights each."""
    step = max(1, PIECE // width)
    return [slice(top, min(top + step, rows)) for top in range(0, rows, step)]


def working_bytes(layer: PackedLinear, rows: int, copies: int) -> int:
    """Estimates the bytes of a product with float weights, see `Kernel.working_bytes`.

    Counts two float32 copies of the output, three of the input, and `copies` of a piece of the
    weight.
    """
    output, entries = rows * layer.out_features, rows * layer.in_features
    piece = min(layer.in_features * layer.out_features, PIECE)
    return 4 * (2 * output + 3 * entries + copies * piece)

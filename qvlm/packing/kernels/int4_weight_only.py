"""Kernel `int4_weight_only`: PyTorch's product of a bf16 input and 4-bit weights on a CPU.

In the notation of `base.py`, the stock operator multiplies with (q - 8) s, where s is rounded to
bf16. The rest of the weight, (8 - z) s, is multiplied with the sum of the group's inputs in
float32. The inputs are steps, which bf16 holds exactly, unless channels differ in scale.

The operator reads the weight in a layout that PyTorch does not document. The kernel packs a known
weight once to see whether the layout is the one that `from_layout` expects. Where it is not, the
kernel does not serve.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from qvlm.packing.kernels.base import Kernel
from qvlm.packing.kernels.float_weight import dequantize
from qvlm.packing.kernels.rounding import BF16_ROUNDOFF, float32_share, quantized_magnitude

if TYPE_CHECKING:
    from qvlm.packing.layer import PackedLinear

GROUP_SIZES = (256, 128, 64, 32)
# The number of outputs must be a multiple of this.
OUTPUTS = 16
# Rows up to which this product is preferred. It reads the weight as it is stored, while int8 x int8
# unpacks the weight first, which pays for many rows only.
DECODING_ROWS = 16
_BLOCK = 64


class _Int4WeightOnly(Kernel):
    name = "int4_weight_only"

    def obstacle(self, layer: PackedLinear) -> str | None:
        form = layer.form
        if form.weight != "uniform":
            return "its weight is not uniform"
        if layer.codes.device.type not in ("cpu", "meta"):
            return "it is not on the CPU"
        if form.weight_bits != 4:
            return f"its weight has {form.weight_bits} bits, not 4"
        if layer.out_features % OUTPUTS:
            return f"its {layer.out_features} outputs are not a multiple of {OUTPUTS}"
        if _group_size(layer) is None:
            sizes = ", ".join(map(str, GROUP_SIZES))
            groups, inputs = f"groups of {form.group_size} weights", f"{layer.in_features} inputs"
            return f"none of the group sizes {sizes} divides its {groups} and its {inputs}"
        if not layout_is_known():
            return "this build of PyTorch packs 4-bit weights in another layout"
        return None

    def is_preferred(self, layer: PackedLinear, rows: int, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16 and rows <= DECODING_ROWS and self.obstacle(layer) is None

    def product(self, layer: PackedLinear, x: Tensor) -> Tensor:
        layer.use_layout(self)
        size = _group_size(layer)
        assert size is not None
        steps, scale, _ = layer.stored_steps(x)
        weight_scale, weight_zero_point = layer.weight_scales()
        repeats = layer.in_features // size // weight_scale.shape[1]
        shared = layer.shares_input_scale(scale)
        y = int4_weight_only(
            steps if shared else steps * scale,
            layer.codes,
            weight_scale.repeat_interleave(repeats, 1),
            weight_zero_point.repeat_interleave(repeats, 1),
            size,
        )
        return y * scale if shared else y

    def working_bytes(self, layer: PackedLinear, rows: int) -> int:
        """Counts the output twice and the input three times in float32; codes in int8 and int32."""
        output, entries = rows * layer.out_features, rows * layer.in_features
        return 8 * output + 12 * entries + 5 * layer.in_features * layer.out_features

    def extra_error(self, layer: PackedLinear, x: Tensor, magnitude: Tensor) -> Tensor:
        """Counts four roundings to bf16 of the stock product, and the float32 rest of the weight.

        Rounded are its scale, its input where channels differ in scale, the weight that it
        multiplies and its output.
        """
        weight_scale, _ = layer.weight_scales()
        eight = torch.full_like(weight_scale, 8)
        stock = dequantize(layer.weight_codes(), weight_scale, eight, layer.form.group_size)
        x_hat = quantized_magnitude(layer, x)
        split = x_hat @ stock.double().abs().T
        rest = x_hat.sum(1, keepdim=True) * 8 * weight_scale.double().amax(1)
        return 4 * BF16_ROUNDOFF * split + float32_share(layer) * (split + rest)

    def to_layout(self, codes: Tensor) -> Tensor:
        """Packs codes [out, in] as the stock product reads them, [out, in / 2] uint8."""
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)

    def from_layout(self, packed: Tensor) -> Tensor:
        """Returns the codes [out, in] uint8 that `to_layout` packed.

        The layout consists of blocks of 64 weight rows, column after column: byte i holds rows
        i (low half) and i + 32. In a smaller last block it holds rows 2 i (low half) and 2 i + 1.
        """
        rows, width = packed.shape[0], packed.shape[1] * 2
        codes = packed.new_empty(rows, width)
        flat = packed.flatten()
        for top in range(0, rows, _BLOCK):
            block = codes[top : top + _BLOCK]
            part = flat[top * width // 2 :][: block.numel() // 2].view(width, -1).T
            if len(block) == _BLOCK:
                block[:32], block[32:] = part & 15, part >> 4
            else:
                block[::2], block[1::2] = part & 15, part >> 4
        return codes


INT4_WEIGHT_ONLY = _Int4WeightOnly()


def int4_weight_only(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor, group_size: int
) -> Tensor:
    """Multiplies an input with a packed 4-bit weight, transposed.

    Args:
        x: Input, [rows, in].
        packed: Weight as `to_layout` packs it, [out, in / 2] uint8.
        scale, zero_point: Parameters of each group, [out, in / group_size] float32.
        group_size: One of `GROUP_SIZES`.

    Returns:
        Output in float32, [rows, out].
    """
    x = x.to(torch.bfloat16)
    rounded = scale.T.to(torch.bfloat16)
    both = torch.stack([rounded, torch.zeros_like(rounded)], dim=2)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, both)
    sums = x.float().unflatten(1, (-1, group_size)).sum(2)
    return y.float() + F.linear(sums, (8 - zero_point) * scale)


def _group_size(layer: PackedLinear) -> int | None:
    """Returns the largest group size of the stock product that divides the layer's, or None."""
    width, group_size = layer.in_features, layer.form.group_size
    fitting = [size for size in GROUP_SIZES if group_size % size == 0 and width % size == 0]
    return fitting[0] if fitting else None


@cache
def layout_is_known() -> bool:
    """Whether this build of PyTorch packs a known weight to what `from_layout` expects."""
    with torch.device("cpu"):  # the caller may be building a model on the meta device
        codes = torch.randint(0, 16, (112, 64), generator=torch.Generator().manual_seed(0))
        try:
            packed = INT4_WEIGHT_ONLY.to_layout(codes)
        except (RuntimeError, AttributeError):  # this build of PyTorch lacks the operator
            return False
        unpacked = INT4_WEIGHT_ONLY.from_layout(packed)
        return packed.shape == (112, 32) and torch.equal(unpacked.long(), codes)

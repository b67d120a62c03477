"""Kernel `reference`: dequantizes the weight and multiplies it with the quantized input.

It serves every layer on every device, in float32 or, in a model in float64, in float64. Only a
piece of the weight is dequantized at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from qvlm.packing.absmax import kept_levels
from qvlm.packing.formats import unpack
from qvlm.packing.kernels.base import Kernel
from qvlm.packing.kernels.float_weight import dequantize, pieces, working_bytes
from qvlm.packing.kernels.native import NATIVE
from qvlm.quantization.precision import wide

if TYPE_CHECKING:
    from qvlm.packing.layer import PackedLinear


class Reference(Kernel):
    """Product of float operands.

    Attributes:
        dtype: Type that both operands are rounded to, unless the model is in float64.
    """

    name = "reference"
    can_sum_in_float64 = True
    dtype: ClassVar[torch.dtype] = torch.float32

    def obstacle(self, layer: PackedLinear) -> str | None:
        return None

    def product(self, layer: PackedLinear, x: Tensor) -> Tensor:
        steps, scale, _ = layer.stored_steps(x)
        in_float64 = x.dtype == torch.float64 and self.can_sum_in_float64
        dtype = torch.float64 if in_float64 else self.dtype
        x_hat = (steps.to(torch.promote_types(dtype, torch.float32)) * scale).to(dtype)
        parts = pieces(layer.out_features, layer.in_features)
        outputs = [x_hat @ float_weight(layer, part, dtype).T for part in parts]
        return wide(torch.cat(outputs, dim=1))

    def working_bytes(self, layer: PackedLinear, rows: int) -> int:
        # PyTorch makes levels, codes in int32, scales and the product; `native` the product only.
        return working_bytes(layer, rows, copies=1 if NATIVE.obstacle(layer) is None else 4)


REFERENCE = Reference()


def float_weight(layer: PackedLinear, rows: slice, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dequantizes rows of a layer's weight, with channels as they are stored, [rows, in].

    Args:
        layer: Any packed layer.
        rows: Rows of the weight, with a start and a stop.
        dtype: Float32 or float64, which gives the weight of a simulation in that type to the bit,
            or bf16, which rounds it.
    """
    layer.use_layout(None)
    if NATIVE.obstacle(layer) is None and dtype != torch.float64:
        return NATIVE.float_weight(layer, rows, dtype)
    form, width = layer.form, layer.in_features
    codes = unpack(layer.codes[rows], form.weight_bits, width)
    if form.weight == "uniform":
        scale, zero_point = (part[rows] for part in layer.weight_scales())
        return dequantize(codes, scale, zero_point, form.group_size, dtype).to(dtype)
    values = kept_levels(form.weight_bits).to(codes.device)[codes.int()]
    begin, end = rows.start * width, rows.stop * width
    first, size = begin // form.group_size, form.group_size
    absmax = layer.absmax()[first : -(-end // size)].repeat_interleave(size)
    return (values * absmax[begin - first * size :][: values.numel()].view_as(values)).to(dtype)

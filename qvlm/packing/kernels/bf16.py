"""Kernel `bf16`: the reference product with both operands rounded to bf16.

It serves every layer, and is preferred in a model in bf16, which rounds its own operands too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qvlm.packing.kernels.reference import Reference
from qvlm.packing.kernels.rounding import bf16_operands

if TYPE_CHECKING:
    from qvlm.packing.layer import PackedLinear


class _BF16(Reference):
    name = "bf16"
    can_sum_in_float64 = False
    dtype = torch.bfloat16

    def is_preferred(self, layer: PackedLinear, rows: int, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16

    def extra_error(self, layer: PackedLinear, x: Tensor, magnitude: Tensor) -> Tensor:
        return bf16_operands(magnitude)


BF16 = _BF16()

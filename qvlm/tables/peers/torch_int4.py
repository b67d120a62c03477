"""PyTorch's own product of inputs in bf16 and weights of 4 bits on a CPU.

It is the stock operator alone, with a scale per group and weights around zero. Our kernel
`int4_weight_only` makes a packed layer's product of it and has more to do.
"""

import torch
from torch import Tensor, nn

from qvlm.packing.kernels.int4_weight_only import INT4_WEIGHT_ONLY
from qvlm.tables.peers.base import rounded
from qvlm.tables.peers.modules import ModulePeer

GROUP_SIZE = 128


class _TorchInt4(ModulePeer):
    name = "PyTorch int4, weights only"
    bits = 4

    def obstacle(self) -> str | None:
        if hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
            return None
        return "This PyTorch has no int4 product for CPUs. Install the pinned version."

    def linear(self, linear: nn.Linear) -> nn.Module:
        return Int4Linear(linear.weight)


class Int4Linear(nn.Module):
    """y = x W^T, where W has 4 bits.

    Args:
        weight: Weight [out, in] in any floating-point type. `GROUP_SIZE` divides `in`.
    """

    packed: Tensor
    scale_and_zero: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.in_features = weight.shape[1]
        codes, scale = rounded(weight, GROUP_SIZE)
        both = torch.stack([scale.T, torch.zeros_like(scale.T)], dim=2)
        self.register_buffer("packed", INT4_WEIGHT_ONLY.to_layout(codes))
        self.register_buffer("scale_and_zero", both.to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in] to [..., out], both bf16."""
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.reshape(-1, self.in_features), self.packed, GROUP_SIZE, self.scale_and_zero
        )
        return y.unflatten(0, x.shape[:-1])


TORCH_INT4 = _TorchInt4()

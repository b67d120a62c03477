"""PyTorch's product of unquantized weights in bf16, which all are compared with."""

from torch import nn

from qvlm.tables.peers.modules import ModulePeer


class _BF16(ModulePeer):
    name = "bf16"
    bits = 16

    def linear(self, linear: nn.Linear) -> nn.Module:
        return linear


BF16 = _BF16()

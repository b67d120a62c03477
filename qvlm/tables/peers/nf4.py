"""bitsandbytes' NormalFloat weights of 4 bits, multiplied with inputs in bf16."""

from importlib.util import find_spec
from typing import ClassVar

from torch import nn

from qvlm.tables.peers.modules import ModulePeer
from qvlm.tables.table4_scale.models import PEER, WITHOUT_KERNELS, nf4_linear


class _NF4(ModulePeer):
    name = PEER.method
    bits = 4
    packages: ClassVar = {"bitsandbytes": "bitsandbytes"}

    def note(self) -> str | None:
        return None if find_spec("kernels") else WITHOUT_KERNELS

    def linear(self, linear: nn.Linear) -> nn.Module:
        return nf4_linear(linear)


NF4 = _NF4()

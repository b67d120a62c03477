"""Packed layers of ours, in the form that every uniform method has by default."""

from functools import cache

from torch import nn

from qvlm.cell.inputs import quantization_config
from qvlm.packing import PackedLinear
from qvlm.packing.uncalibrated import quantize_uncalibrated
from qvlm.planning.footprint import configuration
from qvlm.quantization.spec import QuantizationConfig
from qvlm.tables.peers.modules import ModulePeer


class _Packed(ModulePeer):
    is_ours = True

    def __init__(self, bits: int) -> None:
        self.name, self.bits = f"ours, W{bits}A{bits}", bits

    def linear(self, linear: nn.Linear) -> nn.Module:
        config = _quantization(self.bits)
        layer = quantize_uncalibrated(
            linear, config.weights("language"), config.activation("language"), normal_float=False
        )
        return PackedLinear.from_quantized(layer)


@cache
def _quantization(bits: int) -> QuantizationConfig:
    """Returns how LLaVA-13B is quantized by default."""
    return quantization_config(configuration("llava_13b", f"w{bits}a{bits}"))


W4A4, W8A8 = _Packed(4), _Packed(8)

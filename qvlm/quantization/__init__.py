"""The quantization core: quantizers, ranges, the quantized linear, the walk, the proof of bits.

Three things are kept apart: what a range is (`ranges`), what changes a layer (a method, elsewhere)
and what runs over the model in which order (`calibration`). Nothing here knows a method by name.
"""

from qvlm.quantization.block import Block
from qvlm.quantization.calibration import Walk, batch_by_length
from qvlm.quantization.experts import unfuse_experts
from qvlm.quantization.linear import QuantLinear, compute_in_float64, folded_weight
from qvlm.quantization.quantizer import Quantizer, TokenQuantizer, UniformQuantizer
from qvlm.quantization.ranges import (
    activation_quantizer,
    cluster_channels,
    lp_minimal,
    minmax,
    percentile,
    weight_quantizer,
)
from qvlm.quantization.spec import QuantizationConfig, QuantSpec
from qvlm.quantization.verification import LayerBits, check_bits, expected_layers, measure_bits

__all__ = [
    "Block",
    "LayerBits",
    "QuantLinear",
    "QuantSpec",
    "QuantizationConfig",
    "Quantizer",
    "TokenQuantizer",
    "UniformQuantizer",
    "Walk",
    "activation_quantizer",
    "batch_by_length",
    "check_bits",
    "cluster_channels",
    "compute_in_float64",
    "expected_layers",
    "folded_weight",
    "lp_minimal",
    "measure_bits",
    "minmax",
    "percentile",
    "unfuse_experts",
    "weight_quantizer",
]

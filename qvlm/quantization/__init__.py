"""The quantization core: quantizers, range estimators, the simulated linear, the calibration walk.

Three subjects are kept apart: how a range is estimated (`ranges`), what replaces a layer (a method,
in `qvlm.methods`), and what visits the model in which order (`calibration`). Open `quantizer.py`
first for the arithmetic, `calibration.py` for the walk and `verification.py` for the proof of bits.
It imports nothing of qvlm but `errors`, `bits` and `validation`.
"""

from qvlm.quantization.block import Block
from qvlm.quantization.calibration import Walk, batch_by_length
from qvlm.quantization.experts import unfuse_experts
from qvlm.quantization.linear import QuantLinear, compute_in_float64, folded_weight
from qvlm.quantization.position_quantizer import PositionQuantizer
from qvlm.quantization.quantizer import Quantizer, TokenQuantizer, UniformQuantizer
from qvlm.quantization.ranges import (
    activation_quantizer,
    cluster_channels,
    minmax,
    mse,
    percentile,
    weight_quantizer,
)
from qvlm.quantization.spec import QuantizationConfig, QuantSpec
from qvlm.quantization.verification import LayerBits, check_bits, expected_layers, measure_bits

__all__ = [
    "Block",
    "LayerBits",
    "PositionQuantizer",
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
    "measure_bits",
    "minmax",
    "mse",
    "percentile",
    "unfuse_experts",
    "weight_quantizer",
]

"""Quantized layers and models of a few hundred weights, and what packed layers must give."""

import copy

import torch
from torch import Tensor, nn

from qvlm.methods import RTN
from qvlm.packing.kernels.bounds import accumulation_bound
from qvlm.packing.layer import PackedLinear
from qvlm.quantization.calibration import Walk
from qvlm.quantization.hadamard import hadamard_transform
from qvlm.quantization.linear import QuantLinear, folded_weight
from qvlm.quantization.normal_float import NormalFloatQuantizer
from qvlm.quantization.position_quantizer import PositionQuantizer
from qvlm.quantization.ranges import activation_quantizer, weight_quantizer
from qvlm.quantization.spec import ACTIVATION_GRANULARITIES, QuantizationConfig, QuantSpec
from tests.helpers.toy import toy_batch, toy_batches, toy_llava

# Granularities of inputs that can be packed: all but ranges of a prompt, which no kernel makes.
INPUTS = tuple(name for name in ACTIVATION_GRANULARITIES if name != "per_channel_prompt")
WEIGHTS = ("per_tensor", "per_channel", "per_group", "normal_float")
POSITIONS = 4  # of a sequence, where each position has a range


def quantized(
    shape: tuple[int, int],
    bits: tuple[int, int] = (4, 4),
    weight: str = "per_group",
    inputs: str = "per_tensor",
    group_size: int = 32,
    bias: bool = True,
    seed: int = 0,
    ordered: bool = True,
) -> tuple[QuantLinear, Tensor]:
    """A quantized linear of [out, in] and what its input was calibrated with, [64, in].

    Args:
        group_size: Number of weights in a group and of channels in a cluster.
        ordered: groups of weights follow clusters of inputs.
    """
    torch.manual_seed(seed)
    linear = nn.Linear(shape[1], shape[0], bias=bias)
    samples = torch.randn(64, shape[1]) * torch.rand(shape[1]).add(0.1) + 0.2
    input_quantizer = activation_quantizer(
        samples, QuantSpec(bits[1], inputs, group_size, ranges="minmax", positions=POSITIONS)
    )
    folded = folded_weight(linear.weight, input_quantizer)
    if weight == "normal_float":
        weights = NormalFloatQuantizer.from_weight(folded, bits[0], group_size)
    else:
        spec = QuantSpec(bits[0], weight, group_size, ranges="minmax")
        weights = weight_quantizer(folded, spec, inputs=input_quantizer if ordered else None)
    return QuantLinear.from_linear(
        linear, weights, input_quantizer, layer_name="some.layer"
    ), samples


def some_input(layer: QuantLinear, rows: int) -> Tensor:
    """Random rows [rows, in], or as many sequences where each position has a range."""
    sequences = isinstance(layer.input_quantizer, PositionQuantizer)
    return torch.randn(rows * POSITIONS if sequences else rows, layer.in_features)


def in_float64(layer: QuantLinear) -> QuantLinear:
    """The same layer, which computes in float64."""
    exact = copy.deepcopy(layer)
    exact.compute_in_float64()
    return exact


def check(layer: QuantLinear, x: Tensor) -> PackedLinear:
    """Every kernel that takes the layer gives what it simulates; sums of integers, to the bit."""
    packed = PackedLinear.from_quantized(layer)
    assert torch.equal(packed.weight_codes(), layer.weight_codes())
    assert torch.equal(packed.dequantized(), layer.weight)
    steps, _, zero_point = packed.input_steps(x)
    seen = hadamard_transform(x) if layer.hadamard else x
    codes = layer.input_quantizer.for_tokens(seen).quantize(seen)
    assert torch.equal((steps + zero_point).to(torch.uint8), codes)
    expected, rounded_once = layer(x).double(), in_float64(layer)(x)
    for kernel in packed.serving():
        packed.kernel = kernel
        found = packed(x)
        if kernel == "int_mm" or (kernel == "native" and packed.has_integer_product()):
            # Of float64's sums one in a hundred million lies where float32 rounds either way.
            # Where a sum of integers is zero, float64 leaves a rest of its own rounding.
            rest = 2.0**-50 * rounded_once.abs().max()
            differing = (found - rounded_once).abs() > rest
            assert int(differing.sum()) <= 1, kernel
            assert torch.allclose(found, rounded_once, rtol=2.0**-22)
        error = (found.double() - expected).abs()
        bound = accumulation_bound(packed, x, kernel)
        assert bool((error <= bound).all()), (kernel, float((error / bound).max()))
        assert packed.used[kernel] == 1
    assert torch.equal(packed.weight_codes(), layer.weight_codes())
    return packed


def rounded(bits: int = 4, text: str = "llama") -> nn.Module:
    model = toy_llava(text)
    quantization = QuantizationConfig(
        QuantSpec(bits, "per_group", 32),
        QuantSpec(bits, "per_channel_group", 16),
        QuantSpec(bits, "per_token"),
    )
    RTN().quantize(Walk(model, toy_batches(), quantization))
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**toy_batch(seed=5)).logits

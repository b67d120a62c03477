"""Packed layers that transform their input: the simulated layer's codes, and a round trip."""

import json
from dataclasses import asdict

import pytest
import torch

from qvlm.packing.form import Form
from qvlm.packing.layer import PackedLinear
from qvlm.packing.simulated import simulated
from qvlm.quantization.hadamard import hadamard_transform
from qvlm.quantization.linear import QuantLinear, folded_weight
from qvlm.quantization.ranges import activation_quantizer, weight_quantizer
from qvlm.quantization.spec import QuantSpec
from tests.helpers.layers import check

pytestmark = pytest.mark.instruction_set


def transforming(inputs: str, width: int, bits: int = 4) -> tuple[QuantLinear, torch.Tensor]:
    """A quantized linear [24, width] that transforms its input, and what it was calibrated with."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(width, 24)
    samples = torch.randn(64, width)
    samples[:, 3] *= 30
    turned = hadamard_transform(samples)
    quantizer = activation_quantizer(turned, QuantSpec(bits, inputs, 32))
    weight = folded_weight(linear.weight, quantizer, hadamard=True)
    weights = weight_quantizer(weight, QuantSpec(bits, "per_group", 32), inputs=quantizer)
    layer = QuantLinear.from_linear(linear, weights, quantizer, hadamard=True)
    return layer, samples


@pytest.mark.parametrize("width", [64, 96])
@pytest.mark.parametrize("inputs", ["per_token", "per_tensor", "per_channel", "per_channel_group"])
def test_every_kernel_computes_what_is_simulated(inputs: str, width: int) -> None:
    layer, samples = transforming(inputs, width)
    packed = check(layer, samples)
    assert packed.form.hadamard
    again = simulated(packed)
    assert again.hadamard and torch.equal(again(samples), layer(samples))


def test_the_transform_is_undone_by_the_weight() -> None:
    layer, samples = transforming("per_token", 96, bits=8)
    torch.manual_seed(0)
    exact = torch.nn.Linear(96, 24)(samples)
    assert float((layer(samples) - exact).norm() / exact.norm()) < 0.02
    layer.hadamard = False
    assert float((layer(samples) - exact).norm() / exact.norm()) > 0.5


def test_an_outlier_channel_costs_less_after_the_transform() -> None:
    layer, samples = transforming("per_token", 96)
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 24)
    inputs = activation_quantizer(samples, QuantSpec(4, "per_token"))
    weights = weight_quantizer(linear.weight, QuantSpec(4, "per_group", 32))
    plain = QuantLinear.from_linear(linear, weights, inputs)
    exact = linear(samples)
    errors = [float((each(samples) - exact)[:, :].norm()) for each in (layer, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_a_form_of_an_older_checkpoint_has_no_transform() -> None:
    layer, _ = transforming("per_token", 64)
    fields = json.loads(json.dumps(asdict(PackedLinear.from_quantized(layer).form)))
    del fields["hadamard"]
    fields["scale_shape"] = tuple(fields["scale_shape"])
    for key in ("input_shape", "constants"):
        fields[key] = tuple(fields[key])
    assert not Form(**fields).hadamard

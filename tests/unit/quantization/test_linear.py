"""The simulated linear against integers, its folded weight, and its gradients."""

import numpy as np
import pytest
import torch
from torch import nn

from qvlm.errors import RunError
from qvlm.quantization.linear import QuantLinear, folded_weight
from qvlm.quantization.ranges import activation_quantizer, weight_quantizer
from qvlm.quantization.spec import ACTIVATION_GRANULARITIES, QuantSpec


def quantized(granularity: str, weight: QuantSpec, keep_float: bool = False) -> QuantLinear:
    torch.manual_seed(0)
    linear = nn.Linear(16, 6)
    samples = torch.randn(200, 16) * torch.logspace(-2, 2, 16)
    inputs = activation_quantizer(samples, QuantSpec(4, granularity, 4))
    weights = weight_quantizer(folded_weight(linear.weight, inputs), weight)
    return QuantLinear.from_linear(linear, weights, inputs, keep_float, "the.layer")


@pytest.mark.parametrize("granularity", ["per_tensor", "per_token", "per_channel"])
def test_forward_is_what_integers_compute(granularity: str) -> None:
    """y = s_w (s_x or 1) sum_k (q - z)(Q - Z) + b, with the sum over int64."""
    layer = quantized(granularity, QuantSpec(5, "per_channel"))
    x = torch.randn(7, 16) * torch.logspace(-2, 2, 16)
    inputs, weights = layer.input_quantizer.for_tokens(x), layer.weight_quantizer
    q = inputs.quantize(x).numpy().astype(np.int64) - inputs.zero_point.numpy().astype(np.int64)
    w = layer.weight_codes().numpy().astype(np.int64) - weights.zero_point.numpy().astype(np.int64)
    product = (q @ w.T) * weights.scale.numpy().astype(np.float64).T
    if granularity != "per_channel":
        product = product * inputs.scale.numpy().astype(np.float64)
    expected = product + layer.bias.numpy()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(layer(x).numpy(), expected, atol=1e-5 * scale, rtol=1e-5)


def test_folding_quantizes_the_weight_times_the_input_scale() -> None:
    layer = quantized("per_channel", QuantSpec(8, "per_channel", ranges="minmax"))
    torch.manual_seed(0)
    weight = nn.Linear(16, 6).weight.detach()
    scale = layer.input_quantizer.scale
    step = layer.weight_quantizer.scale
    assert bool(((layer.weight - weight * scale).abs() <= 0.5001 * step).all())
    x = torch.randn(5, 16) * torch.logspace(-2, 2, 16)
    in_own_units = layer.input_quantizer(x) @ (layer.weight / scale).T + layer.bias
    torch.testing.assert_close(layer(x), in_own_units, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight", [QuantSpec(3, "per_channel"), QuantSpec(8, "per_group", 4)])
@pytest.mark.parametrize("granularity", ACTIVATION_GRANULARITIES)
def test_integers_of_the_stored_weight_are_those_of_the_float_weight(
    granularity: str, weight: QuantSpec
) -> None:
    layer = quantized(granularity, weight)
    torch.manual_seed(0)
    original = folded_weight(nn.Linear(16, 6).weight, layer.input_quantizer)
    assert torch.equal(layer.weight_codes(), layer.weight_quantizer.quantize(original))
    assert int(layer.weight_codes().max()) < 2**weight.bits
    assert torch.equal(layer.weight_quantizer.dequantize(layer.weight_codes()), layer.weight)


def test_output_keeps_the_dtype_of_the_input() -> None:
    layer = quantized("per_token", QuantSpec(4, "per_channel"))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert layer(torch.randn(3, 16).to(dtype)).dtype == dtype


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("granularity", ACTIVATION_GRANULARITIES)
def test_a_value_that_is_not_finite_is_an_error_with_the_layers_name(
    granularity: str, bad: float
) -> None:
    layer = quantized(granularity, QuantSpec(4, "per_channel"))
    x = torch.randn(2, 3, 16)
    x[1, 2, 5] = bad
    with pytest.raises(RunError, match=r"the\.layer"):
        layer(x)


def test_a_sum_that_overflows_is_no_error() -> None:
    layer = quantized("per_tensor", QuantSpec(4, "per_channel"))
    assert bool(torch.isfinite(layer(torch.full((4, 16), 1e38))).all())


def test_a_kept_float_weight_trains_through_the_quantizers() -> None:
    layer = quantized("per_tensor", QuantSpec(4, "per_channel"), keep_float=True)
    frozen = quantized("per_tensor", QuantSpec(4, "per_channel"))
    x = torch.randn(64, 16) * torch.logspace(-2, 2, 16)
    assert torch.equal(layer(x), frozen(x))
    assert {name for name, _ in layer.named_parameters()} == {"float_weight", "bias"}
    target = x @ (frozen.weight + 0.1 * torch.randn(6, 16)).T
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    trained, integers = layer(x).detach(), layer.weight_codes()
    layer.freeze()
    assert not list(layer.parameters()) and torch.equal(layer(x), trained)
    assert torch.equal(layer.weight_codes(), integers)
    assert not torch.equal(integers, frozen.weight_codes())


def test_the_weight_gradient_is_that_of_the_dequantized_weight_inside_the_range() -> None:
    layer = quantized("per_tensor", QuantSpec(4, "per_channel", p=0.5), keep_float=True)
    x, upstream = torch.randn(9, 16), torch.randn(9, 6)
    (layer(x) * upstream).sum().backward()
    codes = torch.round(layer.float_weight.detach() / layer.weight_quantizer.scale)
    codes += layer.weight_quantizer.zero_point
    inside = (codes >= 0) & (codes <= 15)
    expected = (upstream.T @ layer.input_quantizer(x)) * inside
    torch.testing.assert_close(layer.float_weight.grad, expected)
    assert not bool(inside.all())


def test_the_input_gradient_passes_where_the_input_is_not_clipped() -> None:
    for granularity in ("per_tensor", "per_channel"):
        layer = quantized(granularity, QuantSpec(4, "per_channel"))
        x = (torch.randn(9, 16) * torch.logspace(-2, 2.5, 16)).requires_grad_()
        upstream = torch.randn(9, 6)
        (layer(x) * upstream).sum().backward()
        inputs = layer.input_quantizer
        codes = torch.round(x.detach() / inputs.scale) + inputs.zero_point
        inside = (codes >= 0) & (codes <= 15)
        scale = inputs.scale if granularity == "per_channel" else 1
        expected = (upstream @ (layer.weight / scale)) * inside
        torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-6)
        assert 0 < inside.sum() < inside.numel()

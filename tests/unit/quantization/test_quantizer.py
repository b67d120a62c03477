"""The quantizer against its formula in numpy, for any finite input; the linear against integers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor, nn

from qvlm.errors import RunError, UserError
from qvlm.quantization.linear import QuantLinear, folded_weight
from qvlm.quantization.quantizer import Quantizer, TokenQuantizer, UniformQuantizer, affine_grid
from qvlm.quantization.ranges import activation_quantizer, minmax, weight_quantizer
from qvlm.quantization.spec import (
    ACTIVATION_GRANULARITIES,
    WEIGHT_GRANULARITIES,
    QuantizationConfig,
    QuantSpec,
)

pytestmark = pytest.mark.instruction_set

BITS = range(2, 9)
MAX = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).tiny)

finite = st.one_of(
    st.floats(-10, 10, width=32),
    st.floats(-MAX, MAX, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-45, TINY, 1e38, -1e38, MAX, -MAX, 65504.0]),
)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Finite matrices of any of three dtypes; also constant ones and constant columns."""
    shape = draw(array_shapes(min_dims=2, max_dims=2, max_side=12))
    values = draw(arrays(np.float32, shape, elements=finite, fill=finite))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    x = torch.from_numpy(values).to(dtype)
    return x.masked_fill(x.isinf(), 0)


def distinct_per_scale(x_hat: Tensor, index: Tensor) -> int:
    index = index.expand(x_hat.shape)
    return max(len(set(x_hat[index == i].tolist())) for i in index.unique().tolist())


def check_grid(quantizer: Quantizer, x: Tensor) -> None:
    grid = quantizer.for_tokens(x)
    assert isinstance(grid, UniformQuantizer)
    assert grid.scale.dtype == torch.float32
    assert bool((grid.scale > 0).all()) and bool(torch.isfinite(grid.scale).all())
    zero_points = grid.zero_point
    assert bool(((zero_points >= 0) & (zero_points <= 2**grid.bits - 1)).all())
    assert torch.equal(zero_points, zero_points.round())
    x_hat = quantizer(x)
    assert x_hat.shape == x.shape and x_hat.dtype == torch.float32
    assert bool(torch.isfinite(x_hat).all())
    assert torch.equal(x_hat, grid.dequantize(quantizer.quantize(x)))
    assert distinct_per_scale(x_hat, quantizer.group_index(x)) <= 2**grid.bits
    assert torch.equal(grid.quantize(x_hat), grid.quantize(x))
    assert torch.equal(quantizer(torch.zeros_like(x)), torch.zeros(x.shape))


@settings(deadline=None, max_examples=150)
@given(matrices(), st.sampled_from(BITS), st.sampled_from(ACTIVATION_GRANULARITIES), st.data())
def test_any_finite_activation_has_a_sound_grid(
    x: Tensor, bits: int, granularity: str, data: st.DataObject
) -> None:
    ranges = data.draw(st.sampled_from(["lp", "minmax"]))
    spec = QuantSpec(bits, granularity, group_size=data.draw(st.integers(1, 5)), ranges=ranges)
    check_grid(activation_quantizer(x, spec), x)


@settings(deadline=None, max_examples=100)
@given(matrices(), st.sampled_from(BITS), st.sampled_from(WEIGHT_GRANULARITIES), st.data())
def test_any_finite_weight_has_a_sound_grid(
    x: Tensor, bits: int, granularity: str, data: st.DataObject
) -> None:
    divisors = [size for size in range(1, x.shape[1] + 1) if x.shape[1] % size == 0]
    size = data.draw(st.sampled_from(divisors))
    spec = QuantSpec(bits, granularity, size, ranges=data.draw(st.sampled_from(["lp", "minmax"])))
    check_grid(weight_quantizer(x, spec), x)


@settings(deadline=None, max_examples=200)
@given(matrices(), st.sampled_from(BITS))
def test_error_within_a_minmax_range_is_half_a_step(x: Tensor, bits: int) -> None:
    x = x.float().clamp(-MAX / 4, MAX / 4)  # beyond, the grid gives way to stay finite
    quantizer = weight_quantizer(x, QuantSpec(bits, "per_channel", ranges="minmax"))
    error = (quantizer(x).double() - x.double()).abs()
    assert bool((error <= 0.5001 * quantizer.scale.double()).all())


@pytest.mark.parametrize("bits", BITS)
def test_formula_against_numpy(bits: int) -> None:
    x = np.random.default_rng(bits).normal(0, 2, (50, 8)).astype(np.float32)
    scale = np.linspace(0.05, 0.4, 8, dtype=np.float32)
    zero_point = np.arange(8, dtype=np.float32) % 2**bits
    q = np.clip(np.rint(x / scale) + zero_point, 0, 2**bits - 1)
    quantizer = UniformQuantizer(bits, torch.from_numpy(scale), torch.from_numpy(zero_point))
    np.testing.assert_array_equal(quantizer.quantize(torch.from_numpy(x)).numpy(), q)
    expected = (q - zero_point) * scale
    np.testing.assert_array_equal(quantizer(torch.from_numpy(x)).numpy(), expected)
    np.testing.assert_array_equal(quantizer.centered(torch.from_numpy(x)).numpy(), q - zero_point)


@pytest.mark.parametrize(
    ("lo", "hi", "bits", "scale", "zero_point"),
    [
        (-1.0, 2.0, 2, 1.0, 1),
        (0.0, 15.0, 4, 1.0, 0),
        (-7.5, 0.0, 4, 0.5, 15),
        (3.0, 15.0, 4, 1.0, 0),  # extended to hold zero
        (-30.0, -15.0, 4, 2.0, 15),
        (0.0, 0.0, 4, TINY, 0),
    ],
)
def test_grid_of_a_range(lo: float, hi: float, bits: int, scale: float, zero_point: int) -> None:
    grid = affine_grid(torch.tensor(lo), torch.tensor(hi), bits)
    assert [value.item() for value in grid] == pytest.approx([scale, zero_point])


@pytest.mark.parametrize("bits", BITS)
def test_a_span_beyond_float32_keeps_both_signs(bits: int) -> None:
    x = torch.tensor([-MAX, MAX])
    x_hat = UniformQuantizer.from_range(x[0], x[1], bits)(x)
    assert bool(torch.isfinite(x_hat).all()) and x_hat[0] < -MAX / 3 and x_hat[1] > MAX / 3


def test_one_scale_per_what_the_granularity_says() -> None:
    x = torch.randn(6, 8)
    index = {
        name: activation_quantizer(x, QuantSpec(4, name, 3)).group_index(x).expand(6, 8)
        for name in ACTIVATION_GRANULARITIES
    }
    assert index["per_tensor"].unique().numel() == 1
    assert torch.equal(index["per_token"], torch.arange(6)[:, None].expand(6, 8))
    assert torch.equal(index["per_channel"], torch.arange(8).expand(6, 8))
    assert sorted(index["per_channel_group"][0].bincount().tolist()) == [2, 3, 3]
    weight = weight_quantizer(x, QuantSpec(4, "per_group", 4))
    assert torch.equal(weight.group_index(x), torch.arange(12).view(6, 2).repeat_interleave(4, 1))
    weight = weight_quantizer(x, QuantSpec(4, "per_channel"))
    assert torch.equal(weight.group_index(x).expand(6, 8), torch.arange(6)[:, None].expand(6, 8))


def test_groups_of_weights_follow_clusters_of_inputs() -> None:
    torch.manual_seed(0)
    weight, samples = torch.randn(5, 24), torch.randn(50, 24) * torch.rand(24)
    inputs = activation_quantizer(samples, QuantSpec(4, "per_channel_group", 8))
    assert isinstance(inputs, UniformQuantizer) and inputs.clusters is not None
    spec = QuantSpec(3, "per_group", 4)
    quantizer = weight_quantizer(weight, spec, inputs=inputs)
    order = quantizer.order
    assert order is not None and sorted(order.tolist()) == list(range(24))
    assert inputs.clusters[order].tolist() == [0] * 8 + [1] * 8 + [2] * 8
    # The same as moving the channels by hand.
    moved = weight_quantizer(weight[:, order], spec)
    assert moved.order is None and torch.equal(moved.scale, quantizer.scale)
    assert torch.equal(quantizer(weight)[:, order], moved(weight[:, order]))
    assert torch.equal(quantizer.quantize(weight)[:, order], moved.quantize(weight[:, order]))
    assert torch.equal(quantizer.dequantize(quantizer.quantize(weight)), quantizer(weight))
    assert torch.equal(quantizer.group_index(weight)[:, order], moved.group_index(weight))
    tighter = quantizer.shrink(0.5)
    assert torch.equal(tighter(weight)[:, order], moved.shrink(0.5)(weight[:, order]))


@pytest.mark.parametrize(
    ("granularity", "group_size", "inputs", "clusters"),
    [
        ("per_channel", 4, "per_channel_group", 8),  # no groups
        ("per_group", 4, "per_channel", 8),  # no clusters
        ("per_group", 4, "per_token", 8),
        ("per_group", 4, "per_channel_group", 24),  # a single one
        ("per_group", 12, "per_channel_group", 8),  # a group would have two
    ],
)
def test_groups_are_neighbours_otherwise(
    granularity: str, group_size: int, inputs: str, clusters: int
) -> None:
    weight, samples = torch.randn(5, 24), torch.randn(50, 24) * torch.rand(24)
    quantizer = activation_quantizer(samples, QuantSpec(4, inputs, clusters))
    spec = QuantSpec(3, granularity, group_size)
    assert weight_quantizer(weight, spec, inputs=quantizer).order is None


def test_per_token_scales_do_not_depend_on_other_tokens() -> None:
    x = torch.randn(2, 5, 16) * torch.tensor([1.0, 100.0])[:, None, None]
    quantizer = TokenQuantizer(4, ratio=0.9)
    alone = torch.stack([torch.stack([quantizer(token) for token in row]) for row in x])
    assert torch.equal(quantizer(x), alone)
    assert torch.equal(quantizer(x), quantizer.for_tokens(x)(x))
    with pytest.raises(TypeError, match=r"for_tokens\(x\)"):
        quantizer.dequantize(quantizer.quantize(x))


def test_per_token_ratio_clips_each_token() -> None:
    x = torch.randn(4, 64)
    x_hat = TokenQuantizer(4, ratio=0.5)(x)
    step = 0.5 * (x.amax(1) - x.amin(1)) / 15
    assert bool((x_hat.amax(1) <= 0.5 * x.amax(1) + step).all())
    assert bool((x_hat.amin(1) >= 0.5 * x.amin(1) - step).all())


def test_shrink_multiplies_the_ends() -> None:
    quantizer = UniformQuantizer.from_range(torch.tensor(-8.0), torch.tensor(7.0), 4)
    assert quantizer.shrink(1.0) is quantizer
    lo, hi = quantizer.shrink(0.5).span()
    assert (lo.item(), hi.item()) == (-4.0, 3.5)
    assert TokenQuantizer(4, 0.8).shrink(0.5).ratio == pytest.approx(0.4)
    for ratio in (0.0, 1.5, float("nan")):
        with pytest.raises(UserError, match="ratio"):
            quantizer.shrink(ratio)
        with pytest.raises(UserError, match="ratio"):
            TokenQuantizer(4, ratio)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_token"])
def test_gradient_is_one_inside_the_range_and_zero_outside(granularity: str) -> None:
    samples = torch.linspace(-1, 1, 40)[:, None] * torch.tensor([1.0, 3.0])
    quantizer = activation_quantizer(samples, QuantSpec(3, granularity, ranges="minmax"))
    quantizer = quantizer.shrink(0.5)
    x = (torch.randn(30, 2) * 2).requires_grad_()
    upstream = torch.randn(30, 2)
    (quantizer(x) * upstream).sum().backward()
    grid = quantizer.for_tokens(x)
    steps = torch.round(x.detach() / grid.scale) + grid.zero_point
    inside = (steps >= 0) & (steps <= 7)
    assert torch.equal(x.grad, upstream * inside)
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(quantizer(x).detach(), quantizer(x.detach()))


def test_a_codebook_gets_a_straight_through_gradient_for_free() -> None:
    class Sign(Quantizer):
        def quantize(self, x: Tensor) -> Tensor:
            return (x > 0).to(torch.uint8)

        def dequantize(self, codes: Tensor) -> Tensor:
            return codes.float() * 2 - 1

        def group_index(self, x: Tensor) -> Tensor:
            return torch.zeros(1, dtype=torch.long)

    x = torch.randn(5, requires_grad=True)
    y = Sign(2)(x)
    (3 * y).sum().backward()
    assert torch.equal(y.detach(), x.detach().sign())
    assert torch.equal(x.grad, torch.full((5,), 3.0))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bits": 1}, "bits=1"),
        ({"bits": 9}, "bits=9"),
        ({"bits": 4.0}, "bits=4.0"),
        ({"granularity": "per_row"}, "per_row"),
        ({"group_size": 0}, "group_size=0"),
        ({"p": 0.0}, "p=0.0"),
        ({"ranges": "best"}, "best"),
    ],
)
def test_a_wrong_spec_is_refused_by_name(change: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        QuantSpec(**{"bits": 4, "granularity": "per_channel", **change})


def test_a_granularity_in_the_wrong_place_is_refused() -> None:
    channel, token, group = (
        QuantSpec(4, name) for name in ("per_channel", "per_token", "per_group")
    )
    with pytest.raises(UserError, match="weight granularity='per_token'"):
        QuantizationConfig(weight=token, language=channel, vision=token)
    with pytest.raises(UserError, match="vision granularity='per_group'"):
        QuantizationConfig(weight=group, language=channel, vision=group)
    config = QuantizationConfig(weight=group, language=channel, vision=token)
    assert [config.activation(kind) for kind in ("vision", "projector", "language")] == [
        token,
        channel,
        channel,
    ]


def test_a_broken_scale_is_refused() -> None:
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="scale"):
            UniformQuantizer(4, torch.tensor([1.0, scale]), torch.zeros(2))


# --- the quantized linear -------------------------------------------------------------------


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
    torch.testing.assert_close(layer.unfolded_weight() * scale, layer.weight)
    x = torch.randn(5, 16) * torch.logspace(-2, 2, 16)
    in_own_units = layer.input_quantizer(x) @ layer.unfolded_weight().T + layer.bias
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
        expected = (upstream @ layer.unfolded_weight()) * inside
        torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-6)
        assert 0 < inside.sum() < inside.numel()


def test_minmax_rule_holds_zero() -> None:
    lo, hi = minmax(torch.tensor([[1.0, 2.0], [-3.0, -1.0]]), QuantSpec(4, "per_channel"))
    assert lo.tolist() == [0.0, -3.0] and hi.tolist() == [2.0, 0.0]

"""Packed layers compute what quantized layers simulate: integers to the bit, outputs in bounds."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qvlm.errors import RunError, UserError
from qvlm.packing.kernels import native
from qvlm.packing.kernels import stock as kernels
from qvlm.packing.layer import PackedLinear, accumulation_bound
from qvlm.quantization.linear import QuantLinear, folded_weight
from qvlm.quantization.normal_float import NormalFloatQuantizer
from qvlm.quantization.quantizer import TokenQuantizer
from qvlm.quantization.ranges import activation_quantizer, weight_quantizer
from qvlm.quantization.spec import ACTIVATION_GRANULARITIES, QuantSpec

needs_native = pytest.mark.skipif(
    native.obstacle() is not None, reason=f"native.c does not run: {native.obstacle()}"
)
WEIGHTS = ("per_tensor", "per_channel", "per_group", "normal_float")


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
        group_size: of weights and of clusters.
        ordered: groups of weights follow clusters of inputs.
    """
    torch.manual_seed(seed)
    linear = nn.Linear(shape[1], shape[0], bias=bias)
    samples = torch.randn(64, shape[1]) * torch.rand(shape[1]).add(0.1) + 0.2
    input_quantizer = activation_quantizer(
        samples, QuantSpec(bits[1], inputs, group_size, ranges="minmax")
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
    codes = layer.input_quantizer.for_tokens(x).quantize(x)
    assert torch.equal((steps + zero_point).to(torch.uint8), codes)
    expected, rounded_once = layer(x).double(), in_float64(layer)(x)
    for kernel in packed.serving():
        packed.kernel = kernel
        found = packed(x)
        if kernel == "int_mm" or (kernel == "native" and packed._is_integer()):
            # Of float64's sums one in a hundred million lies where float32 rounds either way.
            differing = found != rounded_once
            assert int(differing.sum()) <= 1, kernel
            assert torch.allclose(found, rounded_once, rtol=2.0**-22)
        error = (found.double() - expected).abs()
        bound = accumulation_bound(packed, x, kernel)
        assert bool((error <= bound).all()), (kernel, float((error / bound).max()))
        assert packed.used[kernel] == 1
    assert torch.equal(packed.weight_codes(), layer.weight_codes())
    return packed


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_packed_computes_what_is_simulated(data: st.DataObject) -> None:
    group_size = data.draw(st.sampled_from([1, 3, 16, 32, 64, 128]))
    width = group_size * data.draw(st.integers(1, 4))
    out = data.draw(st.one_of(st.integers(1, 40), st.sampled_from([16, 48, 64, 112, 128])))
    layer, _ = quantized(
        (out, width),
        (data.draw(st.integers(2, 8)), data.draw(st.integers(2, 8))),
        data.draw(st.sampled_from(WEIGHTS)),
        data.draw(st.sampled_from(ACTIVATION_GRANULARITIES)),
        group_size,
        data.draw(st.booleans()),
        data.draw(st.integers(0, 1000)),
        data.draw(st.booleans()),
    )
    check(layer, torch.randn(data.draw(st.sampled_from([1, 2, 5, 33])), width))


@needs_native
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_models_in_bf16_round_within_bounds(data: st.DataObject) -> None:
    group_size = data.draw(st.sampled_from([16, 32, 64, 96, 128]))
    width = group_size * data.draw(st.integers(1, 4))
    layer, _ = quantized(
        (data.draw(st.integers(1, 70)), width),
        (data.draw(st.integers(2, 8)), data.draw(st.integers(2, 8))),
        data.draw(st.sampled_from(WEIGHTS)),
        data.draw(st.sampled_from(ACTIVATION_GRANULARITIES)),
        group_size,
        seed=data.draw(st.integers(0, 1000)),
        ordered=data.draw(st.booleans()),
    )
    packed = PackedLinear.from_quantized(layer, "native")
    x = torch.randn(data.draw(st.sampled_from([1, 3, 8, 31])), width).bfloat16()
    # Before the output is rounded to the model's type.
    found = packed._product("native", x) + packed.bias.view(torch.float32)
    error = (found.double() - layer(x.float()).double()).abs()
    assert bool((error <= accumulation_bound(packed, x, "native")).all())


@pytest.mark.parametrize("weight", WEIGHTS[:2])
@pytest.mark.parametrize("width", [1, 7, 77])
def test_odd_widths(weight: str, width: int) -> None:
    for bits in ((4, 8), (8, 8), (6, 6), (3, 5)):
        layer, samples = quantized((5, width), bits, weight, "per_channel_group", 4)
        check(layer, samples)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_sums_of_integers_are_exact(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([(4, 4), (4, 8), (8, 4), (8, 8), (6, 6), (7, 7)]))
    inputs = data.draw(st.sampled_from(ACTIVATION_GRANULARITIES))
    seed, ordered = data.draw(st.integers(0, 99)), data.draw(st.booleans())
    layer, _ = quantized((9, 96), bits, "per_group", inputs, 32, seed=seed, ordered=ordered)
    packed = PackedLinear.from_quantized(layer)
    x = torch.randn(data.draw(st.sampled_from([1, 6])), 96) * 2
    # Cells are of channels as they are stored.
    order = packed.channels()
    steps, _, zero_point = packed.input_steps(x)
    steps, codes = steps[:, order], packed.weight_codes()[:, order]
    if zero_point.shape == (96,):
        zero_point = zero_point[order]
    _, weight_zero_point = packed.weight_scales()
    found = kernels.int_products(
        steps, zero_point, bits[1], codes, weight_zero_point, bits[0], packed.cells()
    )
    if ordered or inputs != "per_channel_group":
        assert len(packed.cells()) == 3
    v = codes.long() - weight_zero_point.long().repeat_interleave(32, 1)
    for cell, product in zip(packed.cells(), found, strict=True):
        expected = steps[:, cell.channels].long() @ v[:, cell.channels].T
        assert torch.equal(product.long(), expected)
    assert sum(cell.width for cell in packed.cells()) == 96


def test_kernel_is_chosen_from_device_rows_bits_and_type(monkeypatch: pytest.MonkeyPatch) -> None:
    bf16 = torch.bfloat16
    four, x = quantized((64, 128), (4, 4), group_size=64)
    eight, _ = quantized((64, 128), (8, 8), group_size=64)
    clusters: dict[str, Any] = {"inputs": "per_channel_group", "group_size": 8}
    scattered, _ = quantized((64, 128), (8, 8), **clusters, ordered=False)
    codebook, _ = quantized((64, 128), (4, 4), "normal_float")
    packed = [PackedLinear.from_quantized(layer) for layer in (four, eight, scattered, codebook)]
    one_cluster, _ = quantized((64, 128), (8, 8), inputs="per_channel_group", group_size=128)
    ordered, _ = quantized((64, 128), (8, 8), **clusters)
    if native.obstacle() is None:
        for layer in (one_cluster, ordered):
            assert PackedLinear.from_quantized(layer).choose(64) == "native"
        for layer in packed:
            assert layer.choose(1) == layer.choose(1, bf16) == "native"
        assert [layer.choose(64) for layer in packed] == ["native"] * 2 + ["reference"] * 2
        assert [layer.choose(64, bf16) for layer in packed] == ["native"] * 2 + ["bf16"] * 2
    monkeypatch.setattr(native, "obstacle", lambda: "there is no C compiler")
    assert packed[0].choose(1, bf16) == "int4_weight_only"
    assert [layer.choose(1) for layer in packed] == ["int_mm"] * 2 + ["reference"] * 2
    packed[0](x[:1].bfloat16())
    packed[0](x)
    assert packed[0].used == {"int4_weight_only": 1, "int_mm": 1}
    with pytest.raises(UserError, match="there is no C compiler"):
        packed[0].kernel = "native"


def test_nothing_is_kept_in_floating_point() -> None:
    layer, x = quantized((256, 256), (4, 4), group_size=64)
    packed = PackedLinear.from_quantized(layer)
    packed(x)
    packed(x[:1])
    tensors = [*packed.parameters(), *packed.buffers()]
    assert not any(tensor.is_floating_point() for tensor in tensors)
    size = sum(tensor.nbytes for tensor in tensors)
    assert size == 256 * 128 + 256 * 4 * (4 + 1) + (4 + 1) + 256 * 4
    state = packed.state_dict()
    assert torch.equal(state["codes"], PackedLinear.from_quantized(layer).codes)


def test_clusters_are_stored_one_after_the_other() -> None:
    layer, x = quantized((48, 96), (4, 4), inputs="per_channel_group")
    packed = PackedLinear.from_quantized(layer)
    assert packed.form.ordered and packed._is_integer()
    assert torch.equal(packed.channels(), layer.weight_quantizer.order)
    _, scale, _ = packed.input_steps(x)
    assert torch.equal(scale, layer.input_quantizer.scale)
    simulated = packed.simulated()
    assert torch.equal(simulated.weight, layer.weight)
    assert torch.equal(simulated.weight_codes(), layer.weight_codes())
    assert torch.equal(simulated(x), layer(x))
    apart = PackedLinear.from_quantized(
        quantized((48, 96), (4, 4), inputs="per_channel_group", ordered=False)[0]
    )
    assert not apart.form.ordered and not apart._is_integer()


def test_casting_the_module_changes_nothing() -> None:
    layer, x = quantized((48, 64), (4, 4), inputs="per_channel_group")
    packed = PackedLinear.from_quantized(layer, "reference")
    assert torch.equal(
        packed.to(torch.bfloat16)(x), PackedLinear.from_quantized(layer, "reference")(x)
    )


@pytest.mark.parametrize("inputs", ACTIVATION_GRANULARITIES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_float64_rounds_the_output_only(weight: str, inputs: str) -> None:
    layer, x = quantized((48, 96), (4, 4), weight, inputs)
    exact = in_float64(layer)
    assert torch.equal(exact.weight_codes(), layer.weight_codes())
    grid = layer.input_quantizer.for_tokens(x)
    steps = grid.quantize(x).double() - grid.zero_point
    x_hat = steps if layer.input_quantizer.folds else steps * grid.scale
    weights = layer.weight_quantizer
    if isinstance(weights, NormalFloatQuantizer):
        constants = weights.dequantized_absmax.double().repeat_interleave(32).view(48, 96)
        w_hat = weights.levels.double()[layer.weight_codes().long()] * constants
    else:
        index = weights.group_index(layer.weight).expand(48, 96)
        scale, zero = (part.flatten()[index] for part in (weights.scale, weights.zero_point))
        w_hat = (layer.weight_codes().double() - zero) * scale
    expected = (x_hat @ w_hat.T + layer.bias).float()
    assert int((exact(x) != expected).sum()) <= 1
    assert not torch.equal(layer(x), expected)  # which float32 does not reach


def test_shapes_and_dtypes_of_inputs_are_kept() -> None:
    layer, _ = quantized((48, 64))
    packed = PackedLinear.from_quantized(layer)
    assert packed(torch.randn(2, 3, 64)).shape == (2, 3, 48)
    assert packed(torch.randn(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert packed(torch.zeros(0, 64)).shape == (0, 48)


def test_bad_kernels_inputs_and_weights_are_named() -> None:
    layer, x = quantized((5, 64), (8, 8))
    with pytest.raises(UserError, match="accepted are auto, reference"):
        PackedLinear.from_quantized(layer, "fast")
    with pytest.raises(UserError, match="int4_weight_only.*some.layer"):
        PackedLinear.from_quantized(layer, "int4_weight_only")
    x[3, 5] = float("inf")
    with pytest.raises(RunError, match="some.layer"):
        PackedLinear.from_quantized(layer)(x)
    assert layer.weight is not None
    layer.weight[2, 3] += 0.01
    with pytest.raises(RunError, match="some.layer"):
        PackedLinear.from_quantized(layer)
    layer.weight_quantizer = TokenQuantizer(8)
    with pytest.raises((UserError, TypeError)):
        PackedLinear.from_quantized(layer)

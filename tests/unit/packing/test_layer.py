"""Packed layers compute what quantized layers simulate: integers to the bit, outputs in bounds."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlm.errors import RunError, UserError
from qvlm.packing.formats import pack, unpack
from qvlm.packing.kernels import int4_weight_only, kernel_named, names
from qvlm.packing.kernels import native_library as native
from qvlm.packing.kernels.bounds import accumulation_bound
from qvlm.packing.layer import PackedLinear
from qvlm.packing.simulated import simulated
from qvlm.quantization.first_token import FirstToken
from qvlm.quantization.normal_float import NormalFloatQuantizer
from qvlm.quantization.quantizer import TokenQuantizer
from qvlm.quantization.spec import ACTIVATION_GRANULARITIES
from tests.helpers.layers import INPUTS, WEIGHTS, check, in_float64, quantized, some_input

pytestmark = [pytest.mark.instruction_set, pytest.mark.slow]


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
        data.draw(st.sampled_from(INPUTS)),
        group_size,
        data.draw(st.booleans()),
        data.draw(st.integers(0, 1000)),
        data.draw(st.booleans()),
    )
    check(layer, some_input(layer, data.draw(st.sampled_from([1, 2, 5, 33]))))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_in_a_model_in_float64_every_kernel_sums_in_float64(data: st.DataObject) -> None:
    group_size = data.draw(st.sampled_from([1, 16, 32, 64]))
    width = group_size * data.draw(st.integers(1, 4))
    layer, _ = quantized(
        (data.draw(st.integers(1, 70)), width),
        (data.draw(st.integers(2, 8)), data.draw(st.integers(2, 8))),
        data.draw(st.sampled_from(WEIGHTS)),
        data.draw(st.sampled_from(INPUTS)),
        group_size,
        seed=data.draw(st.integers(0, 1000)),
        ordered=data.draw(st.booleans()),
    )
    packed = PackedLinear.from_quantized(layer)
    x = some_input(layer, data.draw(st.sampled_from([1, 3, 33]))).double()
    exact = in_float64(layer)
    expected = exact(x)
    assert exact.weight is not None
    largest = float((exact.input_quantizer(x).abs() @ exact.weight.abs().T).max())
    for kernel in ("auto", *packed.serving()):
        packed.kernel = kernel
        found = packed(x)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13 * largest + 1e-300)
    assert all(kernel_named(kernel).sums_in_float64(packed) for kernel in packed.used)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_models_in_bf16_round_within_bounds(data: st.DataObject) -> None:
    group_size = data.draw(st.sampled_from([16, 32, 64, 96, 128]))
    width = group_size * data.draw(st.integers(1, 4))
    layer, _ = quantized(
        (data.draw(st.integers(1, 70)), width),
        (data.draw(st.integers(2, 8)), data.draw(st.integers(2, 8))),
        data.draw(st.sampled_from(WEIGHTS)),
        data.draw(st.sampled_from(INPUTS)),
        group_size,
        seed=data.draw(st.integers(0, 1000)),
        ordered=data.draw(st.booleans()),
    )
    packed = PackedLinear.from_quantized(layer)
    x = some_input(layer, data.draw(st.sampled_from([1, 3, 8, 31]))).bfloat16()
    expected = layer(x.float()).double()
    for kernel in packed.serving():
        # Before the output is rounded to the model's type.
        found = kernel_named(kernel).product(packed, x) + packed.bias.view(torch.float32)
        error = (found.double() - expected).abs()
        assert bool((error <= accumulation_bound(packed, x, kernel)).all()), kernel


@pytest.mark.parametrize("weight", WEIGHTS[:2])
@pytest.mark.parametrize("width", [1, 7, 77])
def test_odd_widths(weight: str, width: int) -> None:
    for bits in ((4, 8), (8, 8), (6, 6), (3, 5)):
        layer, samples = quantized((5, width), bits, weight, "per_channel_group", 4)
        check(layer, samples)


@pytest.mark.parametrize(
    ("obstacle", "int4_layout", "expected"),
    [
        (
            None,
            True,
            {
                (1, torch.float32): ["native"] * 6,
                (1, torch.bfloat16): ["native"] * 6,
                (64, torch.float32): ["native"] * 4 + ["reference"] * 2,
                (64, torch.bfloat16): ["native"] * 4 + ["bf16"] * 2,
            },
        ),
        (
            "no compiler",
            True,
            {
                (1, torch.float32): ["int_mm"] * 3 + ["reference"] * 3,
                (1, torch.bfloat16): ["int4_weight_only"] + ["int_mm"] * 2 + ["bf16"] * 3,
                (64, torch.bfloat16): ["int_mm"] * 3 + ["bf16"] * 3,
            },
        ),
        (
            "no compiler",
            False,
            {
                (1, torch.float32): ["int_mm"] * 3 + ["reference"] * 3,
                (1, torch.bfloat16): ["int_mm"] * 3 + ["bf16"] * 3,
            },
        ),
    ],
)
def test_kernel_is_chosen_from_machine_rows_bits_and_type(
    obstacle: str | None,
    int4_layout: bool,
    expected: dict[tuple[int, torch.dtype], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a machine prefers is asked, and not run: any machine can answer for any other."""
    monkeypatch.setattr(native, "obstacle", lambda: obstacle)
    monkeypatch.setattr(int4_weight_only, "layout_is_known", lambda: int4_layout)
    clusters: dict[str, Any] = {"inputs": "per_channel_group", "group_size": 8}
    layers = (
        quantized((64, 128), (4, 4), group_size=64),
        quantized((64, 128), (8, 8), group_size=64),
        quantized((64, 128), (8, 8), inputs="per_channel_group", group_size=128),
        quantized((64, 128), (8, 8), **clusters),  # too many scale runs for `int_mm`
        quantized((64, 128), (8, 8), **clusters, ordered=False),
        quantized((64, 128), (4, 4), "normal_float"),
    )
    packed = [PackedLinear.from_quantized(layer) for layer, _ in layers]
    for (rows, dtype), chosen in expected.items():
        assert [layer.choose(rows, dtype) for layer in packed] == chosen, (rows, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 64])
def test_the_chosen_kernel_serves_and_is_counted(rows: int, dtype: torch.dtype) -> None:
    layer, x = quantized((64, 128), (4, 4), group_size=64)
    packed = PackedLinear.from_quantized(layer)
    chosen = packed.choose(rows, dtype)
    assert chosen in packed.serving()
    packed(x[:rows].to(dtype))
    packed.kernel = "reference"
    packed(x[:rows])
    assert packed.used == {chosen: 1, "reference": 1}


def test_a_kernel_that_does_not_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = PackedLinear.from_quantized(quantized((64, 128))[0])
    monkeypatch.setattr(native, "obstacle", lambda: "there is no C compiler")
    with pytest.raises(UserError, match=r"native.*some\.layer.*there is no C compiler"):
        packed.kernel = "native"
    assert packed.kernel == "auto"


def test_a_layer_that_moves_to_another_device_chooses_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel for the CPU would read the memory of a GPU. The meta device stands for one."""
    layer, x = quantized((64, 128), (4, 4), group_size=64)
    packed, forced = PackedLinear.from_quantized(layer), PackedLinear.from_quantized(layer)
    kernel = packed.choose(3)
    packed(x[:3])
    forced.kernel = kernel

    def obstacle(layer: PackedLinear) -> str | None:
        return "it is not on the CPU" if layer.codes.is_meta else None

    monkeypatch.setattr(kernel_named(kernel), "obstacle", obstacle)
    assert packed._choose(3, torch.float32) == kernel
    assert packed.to("meta")._choose(3, torch.float32) != kernel
    with pytest.raises(UserError, match=f"{kernel}.*cannot serve some.layer: it is not on the CPU"):
        forced.to("meta")


def test_sums_are_exact_where_onednn_may_not_use_vnni() -> None:
    """PyTorch takes oneDNN because the CPU has VNNI; without it oneDNN saturates in 16 bits."""
    code = (
        "import torch; from qvlm.packing.kernels import int_mm\n"
        "x = torch.full((3, 64), 127, dtype=torch.int8)\n"
        "assert (int_mm._int_mm(x, x) == 64 * 127**2).all()"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


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
    assert packed.form.ordered and packed.has_integer_product()
    assert torch.equal(packed.channels(), layer.weight_quantizer.order)
    _, scale, _ = packed.input_steps(x)
    assert torch.equal(scale, layer.input_quantizer.scale)
    unpacked = simulated(packed)
    assert torch.equal(unpacked.weight, layer.weight)
    assert torch.equal(unpacked.weight_codes(), layer.weight_codes())
    assert torch.equal(unpacked(x), layer(x))
    apart = PackedLinear.from_quantized(
        quantized((48, 96), (4, 4), inputs="per_channel_group", ordered=False)[0]
    )
    assert not apart.form.ordered and not apart.has_integer_product()


@pytest.mark.parametrize("inputs", ["per_tensor", "per_channel", "per_channel_group"])
def test_a_layer_that_has_run_takes_other_numbers(inputs: str) -> None:
    """What kernels keep of a layer is made anew once its buffers are filled with others."""
    layer, x = quantized((48, 64), inputs=inputs)
    other, _ = quantized((48, 64), inputs=inputs, seed=1)
    for kernel in ("native", "int_mm", "reference"):
        if kernel not in PackedLinear.from_quantized(layer).serving():
            continue
        packed, expected = (PackedLinear.from_quantized(each, kernel) for each in (layer, other))
        before = packed(x)
        packed.load_state_dict(expected.state_dict())
        assert torch.equal(packed(x), expected(x)), kernel
        assert not torch.equal(packed(x), before), kernel


def test_a_layer_in_the_layout_of_a_kernel_takes_other_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A checkpoint's codes are not read as those of the kernel that ran before."""
    kernel = kernel_named("int4_weight_only")
    monkeypatch.setattr(type(kernel), "to_layout", lambda _, codes: 255 - pack(codes, 4))
    monkeypatch.setattr(type(kernel), "from_layout", lambda _, packed: unpack(255 - packed, 4, 64))
    layer, other = (
        PackedLinear.from_quantized(quantized((48, 64), seed=seed)[0], "reference")
        for seed in (0, 1)
    )
    layer.use_layout(kernel)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.weight_codes(), other.weight_codes())


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_layer_whose_memory_moves_computes_the_same(weight: str) -> None:
    """Sharing tensors with another process moves them, and leaves each the same object."""
    packed = PackedLinear.from_quantized(quantized((48, 64), weight=weight)[0])
    x = torch.randn(3, 64)
    expected, before = packed(x), [tensor.data_ptr() for tensor in packed.buffers()]
    packed.share_memory()
    assert [tensor.data_ptr() for tensor in packed.buffers()] != before
    taken = [torch.full_like(tensor, 85) for tensor in packed.buffers() for _ in range(50)]
    assert torch.equal(packed(x), expected)
    assert taken


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
    scale, zero_point = (
        part.repeat(len(x) // len(part), 1) if inputs == "per_position" else part
        for part in (grid.scale, grid.zero_point)
    )
    steps = grid.quantize(x).double() - zero_point
    x_hat = steps if layer.input_quantizer.folds else steps * scale
    weights = layer.weight_quantizer
    if isinstance(weights, NormalFloatQuantizer):
        constants = weights.dequantized_absmax.repeat_interleave(32).view(48, 96)
        w_hat = (weights.levels[layer.weight_codes().long()] * constants).double()
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


@pytest.mark.parametrize("zero_point", [-3.0, 2.5, 16.0, 300.0, float("nan")])
def test_zero_points_that_are_not_codes_are_refused(zero_point: float) -> None:
    """The simulation computes with them, but a byte would hold another number."""
    for part in ("weight", "input"):
        layer, _ = quantized((5, 64), (4, 4))
        quantizer = getattr(layer, f"{part}_quantizer")
        other = quantizer.with_scales(
            quantizer.scale, torch.full_like(quantizer.zero_point, zero_point)
        )
        setattr(layer, f"{part}_quantizer", other)
        if part == "weight":  # to values of the new grid
            codes = torch.zeros(5, 64, dtype=torch.uint8)
            layer.weight = other.dequantize(codes)
        with pytest.raises((UserError, RunError), match=f"{part} of some.layer"):
            PackedLinear.from_quantized(layer)


def test_bad_kernels_inputs_and_weights_are_named() -> None:
    layer, x = quantized((5, 64), (8, 8))
    with pytest.raises(UserError, match=f"Choose one of: {', '.join(names())}"):
        PackedLinear.from_quantized(layer, "fast")
    with pytest.raises(UserError, match="int4_weight_only.*some.layer: its weight has 8 bits"):
        PackedLinear.from_quantized(layer, "int4_weight_only")
    ranged_per_prompt, _ = quantized((4, 32), inputs="per_channel_prompt")
    with pytest.raises(UserError, match="input of some.layer cannot be packed"):
        PackedLinear.from_quantized(ranged_per_prompt)
    x[3, 5] = float("inf")
    with pytest.raises(RunError, match="some.layer"):
        PackedLinear.from_quantized(layer)(x)
    layer.first_token = FirstToken({})
    with pytest.raises(UserError, match="some.layer cannot be packed, because its input stays"):
        PackedLinear.from_quantized(layer)
    layer.first_token = None
    assert layer.weight is not None
    layer.weight[2, 3] += 0.01
    with pytest.raises(RunError, match="some.layer"):
        PackedLinear.from_quantized(layer)
    layer.weight_quantizer = TokenQuantizer(8)
    with pytest.raises((UserError, TypeError)):
        PackedLinear.from_quantized(layer)

"""Checks of Triton's products on a CPU under its interpreter.

`test_triton.py` runs this file in a process of its own with TRITON_INTERPRET=1.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlm.packing.formats import pack, unit
from qvlm.packing.kernels import triton_kernels
from qvlm.packing.layer import PackedLinear
from tests.helpers.layers import check, quantized


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_packed_computes_what_is_simulated(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([(4, 4), (4, 8), (6, 6), (8, 8), (3, 5)]))
    weight = data.draw(st.sampled_from(["per_tensor", "per_channel", "per_group"]))
    inputs = data.draw(st.sampled_from(["per_tensor", "per_token", "per_channel_group"]))
    width = data.draw(st.sampled_from([96, 64] if weight == "per_group" else [1, 7, 77, 130]))
    shape = (data.draw(st.sampled_from([1, 5, 70])), width)
    ordered = data.draw(st.booleans())
    layer, _ = quantized(shape, bits, weight, inputs, 32, data.draw(st.booleans()), ordered=ordered)
    packed = check(layer, torch.randn(data.draw(st.sampled_from([1, 4, 5, 33])), width))
    if inputs == "per_channel_group" and width > 32:
        assert ("triton" in packed.serving()) == (weight == "per_group" and ordered)
    else:
        assert "triton" in packed.serving()


@pytest.mark.parametrize("rows", [2, 6])
@pytest.mark.parametrize("bits", [(4, 4), (4, 8), (8, 4), (8, 8), (6, 6)])
@pytest.mark.parametrize("inputs", ["static", "token", "folded"])
def test_integers_are_equal_to_the_bit(rows: int, bits: tuple[int, int], inputs: str) -> None:
    """Weight scales are one, so outputs are exact sums; an identity gives the input's steps."""
    weight_bits, input_bits = bits
    width, group_size = 48, 24
    torch.manual_seed(rows)
    codes = torch.randint(0, 2**weight_bits, (width + 3, width), dtype=torch.uint8)
    zero_point = torch.randint(0, 2**weight_bits, (width + 3, 2), dtype=torch.uint8)
    zero_point[:width] = 2
    codes[:width] = 2 + torch.eye(width, dtype=torch.uint8)
    assert group_size % unit(weight_bits)[0] == 0
    shape = {"static": (), "token": (rows, 1), "folded": (width,)}[inputs]
    scale = torch.rand(shape) + 0.1
    zero = torch.randint(0, 2**input_bits, shape).float()
    x = torch.randn(rows, width) * 2.0**input_bits / 4
    x[0, :9] = (torch.arange(9) - 4.5) * scale.flatten()[:1].expand(
        9
    )  # some lie half way between steps
    steps = (x / scale).round().clamp(-zero, 2**input_bits - 1 - zero)
    found = triton_kernels.linear(
        x,
        scale,
        zero,
        input_bits,
        pack(codes, weight_bits),
        torch.ones(width + 3, 2),
        zero_point,
        weight_bits,
        group_size,
        inputs == "folded",
    )
    v = codes.double() - zero_point.double().repeat_interleave(group_size, 1)
    expected = (steps.double() @ v.T).float()
    assert torch.equal(found, expected if inputs == "folded" else expected * scale)


def test_the_cpu_prefers_its_own_and_outputs_are_rounded_once() -> None:
    layer, x = quantized((48, 64), (4, 4), group_size=64)
    packed = PackedLinear.from_quantized(layer)
    assert packed.choose(1) != "triton" and packed.choose(64) != "triton"
    # As `int4_weight_only` leaves the codes of a last block of fewer than 64 rows.
    codes = packed.weight_codes()
    packed.codes = (codes[::2] | codes[1::2] << 4).T.reshape(48, 32)
    packed.layout = "int4_weight_only"
    assert torch.equal(packed.weight_codes(), codes)
    packed.kernel = "triton"
    x = x[:6].half()  # the interpreter truncates to bfloat16 instead of rounding
    assert torch.equal(packed(x), packed(x.float()).half())
    assert packed(x[:0]).shape == (0, 48)
    assert packed.used["triton"] == 3

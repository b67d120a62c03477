"""Checks of products of whole chunks, and of NormalFloat, on a CPU under Triton's interpreter.

`test_triton.py` runs this file in a process of its own with TRITON_INTERPRET=1.
"""

import pytest
import torch

from qvlm.errors import RunError
from qvlm.packing.kernels import triton
from qvlm.packing.kernels.triton import TRITON, chunk_size
from qvlm.packing.kernels.triton_inputs import token_grid
from qvlm.packing.layer import PackedLinear
from qvlm.quantization.quantizer import affine_grid
from tests.helpers.layers import check, quantized

INPUTS = ("per_tensor", "per_token", "per_channel", "per_channel_group")


@pytest.mark.parametrize("rows", [2, 33])
@pytest.mark.parametrize("bits", [(4, 4), (4, 8), (8, 4), (8, 8)])
@pytest.mark.parametrize("inputs", INPUTS)
def test_chunks_compute_what_is_simulated(rows: int, bits: tuple[int, int], inputs: str) -> None:
    for weight, group_size, width in (
        ("per_group", 64, 128),
        ("per_group", 128, 256),
        ("per_channel", 0, 192),
        ("per_tensor", 0, 128),
    ):
        if inputs == "per_channel_group" and weight != "per_group":
            continue  # channels of a weight group would differ in scale
        layer, _ = quantized((5, width), bits, weight, inputs, group_size or 64, rows == 2)
        packed = check(layer, torch.randn(rows, width))
        assert chunk_size(packed.form) is not None
        assert "triton" in packed.serving()


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("inputs", INPUTS)
def test_normal_float_blocks_compute_what_is_simulated(rows: int, inputs: str) -> None:
    layer, _ = quantized((5, 192), (4, 4), "normal_float", inputs, 64)
    assert "triton" in check(layer, torch.randn(rows, 192)).serving()


def test_scales_of_tokens_are_those_of_the_quantizer() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 70) * torch.logspace(-38, 37, 50)[:, None]
    x[3] = 0
    x[4], x[5] = x[4].abs(), -x[5].abs()
    for bits, ratio in ((4, 1.0), (8, 0.7)):
        lo, hi = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        expected = affine_grid(lo * ratio, hi * ratio, bits)
        for found, value in zip(token_grid(x, bits, ratio), expected, strict=True):
            assert torch.equal(found, value)


@pytest.mark.parametrize("weight", ["per_group", "normal_float"])
@pytest.mark.parametrize("rows", [2, 6])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_gives_nan(
    weight: str, rows: int, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be raised while a CUDA graph is captured; the answer must not look right."""
    layer, x = quantized((16, 128), weight=weight, inputs="per_channel_group", group_size=64)
    packed = PackedLinear.from_quantized(layer, "triton")
    x = x[:rows].clone()
    expected = packed(x)
    x[1, 70] = value
    with pytest.raises(RunError, match=r"some\.layer is not finite"):
        packed(x)
    assert packed.bias is not None
    monkeypatch.setattr(triton, "require_finite", lambda layer, x: None)  # as while one is captured
    found = TRITON.linear(packed, x, packed.bias.view(torch.float32))
    assert bool(found[1].isnan().all())
    kept = [row for row in range(rows) if row != 1]
    assert torch.equal(found[kept], expected[kept])


@pytest.mark.parametrize("weight", ["per_group", "normal_float"])
def test_an_input_without_rows_gives_an_output_without_rows(weight: str) -> None:
    layer, x = quantized((16, 128), weight=weight, inputs="per_token", group_size=64)
    assert PackedLinear.from_quantized(layer, "triton")(x[:0]).shape == (0, 16)

"""NormalFloat against bitsandbytes, to the bit, and against the normal distribution."""

from statistics import NormalDist

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor, nn

from qvlm.errors import UserError
from qvlm.quantization.linear import QuantLinear
from qvlm.quantization.normal_float import (
    NormalFloatQuantizer,
    dynamic_levels,
    normal_float_levels,
)
from qvlm.quantization.quantizer import TokenQuantizer
from tests.helpers.nf4 import reference

pytestmark = pytest.mark.instruction_set

BITS = range(2, 9)
MAX = float(np.finfo(np.float32).max)

weights = st.one_of(
    st.floats(-1, 1, width=32),
    st.floats(-MAX, MAX, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-40, 9e-39, 1.2e-38, -1e-30, 1e30, MAX, -MAX]),
)


def check_against_reference(x: Tensor) -> None:
    quantizer = NormalFloatQuantizer.from_weight(x, 4)
    codes, values = reference(x)
    assert torch.equal(quantizer.quantize(x), codes)
    if bool(torch.isfinite(values).all()):
        assert torch.equal(quantizer(x), values)
        assert torch.equal(quantizer.dequantize(codes), values)
    else:  # the sum of its absmax values overflowed
        assert bool(torch.isfinite(quantizer(x)).all())


@pytest.mark.parametrize("shape", [(64,), (128, 128), (48, 344), (7, 30), (77,), (1,), (65, 33)])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-30, 1e-39, 1e-44, 1e30, MAX / 2])
def test_nf4_is_that_of_bitsandbytes(shape: tuple[int, ...], size: float) -> None:
    torch.manual_seed(len(shape))
    rows = torch.rand(shape[0], *[1] * (len(shape) - 1))
    check_against_reference(torch.randn(shape).clamp(-2, 2) * rows * size)


def test_nf4_of_a_large_weight_with_outliers_and_zero_blocks() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 640) * torch.logspace(-3, 1, 512)[torch.randperm(512), None]
    x[3] = 0
    x[17, 64:128] = 0
    x[40, 5] = 300
    check_against_reference(x)
    check_against_reference(torch.zeros(10, 64))
    check_against_reference(torch.ones(130))


@settings(deadline=None, max_examples=200)
@given(arrays(np.float32, array_shapes(max_dims=2, max_side=90), elements=weights, fill=weights))
def test_nf4_is_that_of_bitsandbytes_for_any_weight(values: np.ndarray) -> None:
    check_against_reference(torch.from_numpy(values))


@settings(deadline=None, max_examples=150)
@given(
    arrays(np.float32, array_shapes(max_dims=2, max_side=30), elements=weights, fill=weights),
    st.sampled_from(BITS),
    st.sampled_from([1, 3, 64]),
    st.sampled_from([None, 2, 256]),
)
def test_any_weight_has_a_sound_codebook(
    values: np.ndarray, bits: int, block: int, nested_block: int | None
) -> None:
    x = torch.from_numpy(values)
    quantizer = NormalFloatQuantizer.from_weight(x, bits, block, nested_block)
    codes, x_hat = quantizer.quantize(x), quantizer(x)
    assert codes.shape == x.shape and codes.dtype == torch.uint8 and int(codes.max()) < 2**bits
    assert x_hat.shape == x.shape and x_hat.dtype == torch.float32
    assert bool(torch.isfinite(x_hat).all())
    index = quantizer.group_index(x)
    assert torch.equal(index.flatten(), torch.arange(x.numel()) // block)
    assert all(len(x_hat[index == group].unique()) <= 2**bits for group in index.unique().tolist())
    normal = (quantizer.dequantized_absmax.abs() >= 1e-38)[index]
    again = quantizer(x_hat)
    assert torch.equal(again[normal], x_hat[normal])


def test_nf4_levels_are_the_published_table() -> None:
    assert torch.equal(normal_float_levels(4), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_levels(), bnb.create_dynamic_map())


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_evenly_spaced_in_probability(bits: int) -> None:
    levels = normal_float_levels(bits).double().numpy()
    assert len(set(levels.tolist())) == 2**bits and sorted(levels) == levels.tolist()
    assert (levels[0], levels[-1], levels[2 ** (bits - 1) - 1]) == (-1, 1, 0)
    count = 2**bits
    top = 1 - (1 / (2 * count) + 1 / (2 * (count - 1))) / 2
    normal = NormalDist()
    end = normal.inv_cdf(top)
    probabilities = np.array([normal.cdf(level * end) for level in levels])
    zero = 2 ** (bits - 1) - 1
    for side in (probabilities[: zero + 1], probabilities[zero:]):
        np.testing.assert_allclose(np.diff(side), (side[-1] - side[0]) / (len(side) - 1), rtol=1e-3)


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_nearest_levels_of_the_block_maximum(bits: int) -> None:
    torch.manual_seed(bits)
    x = torch.randn(6, 64)
    quantizer = NormalFloatQuantizer.from_weight(x, bits, nested_block_size=None)
    absmax = x.abs().amax(1, keepdim=True)
    levels = normal_float_levels(bits)
    distance = (x[..., None] / absmax[..., None] - levels).abs()
    best = distance.amin(2)
    assert bool(((x / absmax - levels[quantizer.quantize(x).long()]).abs() <= best + 1e-6).all())
    torch.testing.assert_close(quantizer(x), levels[quantizer.quantize(x).long()] * absmax)


def test_more_bits_lose_less_and_double_quantization_loses_little() -> None:
    torch.manual_seed(0)
    x = torch.randn(128, 128)
    errors = [float((NormalFloatQuantizer.from_weight(x, b)(x) - x).square().mean()) for b in BITS]
    assert errors == sorted(errors, reverse=True)
    single = NormalFloatQuantizer.from_weight(x, 4, nested_block_size=None)
    assert errors[2] < 1.01 * float((single(x) - x).square().mean())


def test_a_linear_gives_back_its_integers() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 40)
    linear.weight.data *= torch.logspace(-2, 1, 40)[:, None]
    quantizer = NormalFloatQuantizer.from_weight(linear.weight, 4)
    layer = QuantLinear.from_linear(linear, quantizer, TokenQuantizer(4))
    assert torch.equal(quantizer.dequantize(layer.weight_codes()), layer.weight)
    assert torch.equal(layer.weight.flatten(), reference(linear.weight.detach())[1].flatten())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((1,), "bits=1"),
        ((9,), "bits=9"),
        ((4, 0), "block_size=0"),
        ((4, 64, 0), "nested_block_size=0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(arguments: tuple[int, ...], named: str) -> None:
    with pytest.raises(UserError, match=named):
        NormalFloatQuantizer.from_weight(torch.ones(4), *arguments)

"""Packed absmax: the quantizer's dequantized absmax comes back to the bit."""

import pytest
import torch

from qvlm.packing.absmax import PackedAbsmax
from qvlm.quantization.normal_float import NormalFloatQuantizer


@pytest.mark.parametrize("size", [256, 64, None])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_absmax_comes_back_to_the_bit(bits: int, size: int | None) -> None:
    weight = torch.randn(67, 333, generator=torch.Generator().manual_seed(bits))
    quantizer = NormalFloatQuantizer.fit(weight, bits, 64, size)
    absmax = PackedAbsmax.of(quantizer)
    assert (absmax.codes is None) == (size is None)
    assert torch.equal(absmax.dequantize(), quantizer.dequantized_absmax)


def test_absmax_in_unusual_nested_blocks_stays_float() -> None:
    weight = torch.randn(67, 333, generator=torch.Generator().manual_seed(0))
    quantizer = NormalFloatQuantizer.fit(weight, 4, 64, 100)
    absmax = PackedAbsmax.of(quantizer)
    assert absmax.codes is None
    assert torch.equal(absmax.dequantize(), quantizer.dequantized_absmax)

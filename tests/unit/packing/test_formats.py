"""Packed codes: every bit width and length comes back, and the bytes follow the format."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlm.errors import UserError
from qvlm.packing.formats import pack, packed_width, unpack

pytestmark = pytest.mark.instruction_set


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(1, 5), st.integers(0, 67), st.integers(0, 2**31))
def test_unpacking_gives_the_codes_back(bits: int, rows: int, count: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, count), generator=random).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_width(count, bits)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, count), codes)


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(1, 40), st.integers(0, 2**31))
def test_bytes_are_the_stream_of_bits(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, count)
    stream = "".join(f"{code:0{bits}b}"[::-1] for code in codes)
    stream += "0" * (-len(stream) % 8)
    expected = [int(stream[at : at + 8][::-1], 2) for at in range(0, len(stream), 8)]
    assert pack(torch.from_numpy(codes), bits).tolist() == expected


def test_sizes_of_the_named_formats() -> None:
    assert [packed_width(4, bits) for bits in (4, 6, 8)] == [2, 3, 4]
    assert pack(torch.tensor([1, 2, 3]), 4).tolist() == [0x21, 0x03]
    assert pack(torch.tensor([1, 2, 3, 63]), 6).tolist() == [0x81, 0x30, 0xFC]


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(UserError, match="from 2 to 8"):
        pack(torch.zeros(3, dtype=torch.uint8), bits)
    with pytest.raises(UserError, match="from 2 to 8"):
        unpack(torch.zeros(3, dtype=torch.uint8), bits, 3)


def test_codes_and_bytes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="0 to 7"):
        pack(torch.tensor([8]), 3)
    with pytest.raises(UserError, match="take 2 bytes"):
        unpack(torch.zeros(3, dtype=torch.uint8), 4, 4)

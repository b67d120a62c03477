"""How the types of GGUF store a block of weights: codes, scales, and minima.

A block of 32 weights has one scale, a block of 256 (the K types) sub-blocks whose scales are codes
themselves, times one float16. Every function takes blocks [blocks, bytes] uint8.

Source: https://github.com/ggml-org/llama.cpp, `ggml-quants.c` and `gguf-py/gguf/quants.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Blocks(NamedTuple):
    """The numbers of a tensor; a value is `scale * (levels[code] or code - zero) - minimum`.

    Attributes:
        codes: Codes, [scales, members] uint8.
        scale: Scale of each row, [scales] float32.
        outer: Stored scale of each block, [blocks] float16.
        zero: Code of the value zero.
        minimum: Subtracted from each row, [scales] float32, or None.
        levels: Values of the codes, or None.
    """

    codes: Tensor
    scale: Tensor
    outer: Tensor
    zero: int = 0
    minimum: Tensor | None = None
    levels: Tensor | None = None


class Kind(NamedTuple):
    """A type: its name, the bits of a code, and the function that reads its blocks."""

    name: str
    bits: int
    read: Callable[[Tensor], Blocks]


_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _half(blocks: Tensor, place: int) -> Tensor:
    """The float16 at a place of each block."""
    return blocks[:, place : place + 2].contiguous().view(torch.float16)[:, 0]


def _low_then_high(packed: Tensor) -> Tensor:
    """Codes of 4 bits: those of all low halves, then those of all high ones."""
    return torch.cat([packed & 15, packed >> 4], dim=1)


def _fifth_bits(packed: Tensor) -> Tensor:
    """The bits of 4 bytes as the fifth bit of 32 codes."""
    return ((packed[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1) << 4


def _planes(packed: Tensor, run: int, bits: int) -> Tensor:
    """Codes that lie in planes: `run` bytes hold the lowest bits of `run` codes, then the next."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    return ((packed.unflatten(1, (-1, 1, run)) >> shifts) & (2**bits - 1)).flatten(1)


def _q4_0(blocks: Tensor) -> Blocks:
    d = _half(blocks, 0)
    return Blocks(_low_then_high(blocks[:, 2:]), d.float(), d, zero=8)


def _q4_1(blocks: Tensor) -> Blocks:
    d, m = _half(blocks, 0), _half(blocks, 2)
    codes = _low_then_high(blocks[:, 4:])
    return Blocks(codes, d.float(), d, minimum=-m.float())


def _q5_0(blocks: Tensor) -> Blocks:
    d = _half(blocks, 0)
    codes = _low_then_high(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return Blocks(codes, d.float(), d, zero=16)


def _q5_1(blocks: Tensor) -> Blocks:
    d, m = _half(blocks, 0), _half(blocks, 2)
    codes = _low_then_high(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return Blocks(codes, d.float(), d, minimum=-m.float())


def _q8_0(blocks: Tensor) -> Blocks:
    d = _half(blocks, 0)
    return Blocks(blocks[:, 2:] ^ 128, d.float(), d, zero=128)


def _iq4_nl(blocks: Tensor) -> Blocks:
    d = _half(blocks, 0)
    levels = torch.tensor(_IQ4_NL).float()
    return Blocks(_low_then_high(blocks[:, 2:]), d.float(), d, levels=levels)


def _q2_k(blocks: Tensor) -> Blocks:
    d, low = _half(blocks, 80), _half(blocks, 82)
    scales, minima = blocks[:, :16] & 15, blocks[:, :16] >> 4
    codes = _planes(blocks[:, 16:80], 32, 2)
    return _of_sub_blocks(codes, 16, d, scales.float(), low, minima.float())


def _q3_k(blocks: Tensor) -> Blocks:
    d = _half(blocks, 108)
    high = _planes(blocks[:, :32], 32, 1)
    codes = _planes(blocks[:, 32:96], 32, 2) | high << 2
    low_bits = _low_then_high(blocks[:, 96:104])
    high_bits = _planes(blocks[:, 104:108], 4, 2)
    scales = (low_bits | high_bits << 4).float() - 32
    return _of_sub_blocks(codes, 16, d, scales)._replace(zero=4)


def _q4_k(blocks: Tensor) -> Blocks:
    scales, minima = _six_bits(blocks[:, 4:16])
    codes = _planes(blocks[:, 16:], 32, 4)
    return _of_sub_blocks(codes, 32, _half(blocks, 0), scales, _half(blocks, 2), minima)


def _q5_k(blocks: Tensor) -> Blocks:
    scales, minima = _six_bits(blocks[:, 4:16])
    codes = _planes(blocks[:, 48:], 32, 4) | _planes(blocks[:, 16:48], 32, 1) << 4
    return _of_sub_blocks(codes, 32, _half(blocks, 0), scales, _half(blocks, 2), minima)


def _q6_k(blocks: Tensor) -> Blocks:
    low, high = _planes(blocks[:, :128], 64, 4), _planes(blocks[:, 128:192], 32, 2)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return _of_sub_blocks(low | high << 4, 16, _half(blocks, 208), scales)._replace(zero=32)


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of 8 sub-blocks, 6 bits each, in 12 bytes."""
    first, second, rest = packed.split(4, dim=1)
    scales = torch.cat([first & 63, (rest & 15) | ((first >> 2) & 48)], dim=1)
    minima = torch.cat([second & 63, (rest >> 4) | ((second >> 2) & 48)], dim=1)
    return scales.float(), minima.float()


def _of_sub_blocks(
    codes: Tensor,
    size: int,
    d: Tensor,
    scales: Tensor,
    low: Tensor | None = None,
    minima: Tensor | None = None,
) -> Blocks:
    """Blocks of sub-blocks of `size` weights, scaled by `d * scales`, less `low * minima`."""
    scale = (d.float()[:, None] * scales).flatten()
    if low is None or minima is None:
        return Blocks(codes.view(-1, size), scale, d)
    minimum = (low.float()[:, None] * minima).flatten()
    return Blocks(codes.view(-1, size), scale, d, minimum=minimum)


KINDS = {
    2: Kind("Q4_0", 4, _q4_0),
    3: Kind("Q4_1", 4, _q4_1),
    6: Kind("Q5_0", 5, _q5_0),
    7: Kind("Q5_1", 5, _q5_1),
    8: Kind("Q8_0", 8, _q8_0),
    10: Kind("Q2_K", 2, _q2_k),
    11: Kind("Q3_K", 3, _q3_k),
    12: Kind("Q4_K", 4, _q4_k),
    13: Kind("Q5_K", 5, _q5_k),
    14: Kind("Q6_K", 6, _q6_k),
    20: Kind("IQ4_NL", 4, _iq4_nl),
}

"""How codes of 2 to 8 bits are packed into bytes.

A row of codes is one stream of bits, lowest bit first: code i takes the bits i b to (i + 1) b - 1,
and bit j is bit j mod 8 of byte j div 8. So a byte holds two INT4 codes (the first in its low
half), three bytes hold four INT6 codes, and INT8 codes take a byte each; every other bit width
follows the same rule. Each row of the last dimension begins at a byte of its own and ends with the
byte that holds its last code, whose unused bits are zero. A row of n codes takes ceil(n b / 8)
bytes.

Left out: entropy coding, and formats that store outliers separately.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from qvlm.errors import UserError


def packed_width(count: int, bits: int) -> int:
    """Returns the number of bytes of a row of `count` codes."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes into bytes.

    Args:
        codes: Integers from 0 to 2^bits - 1, [..., n].
        bits: Bit width of the codes.

    Returns:
        Packed codes, [..., ceil(n bits / 8)] uint8.

    Raises:
        UserError: If `bits` is not in 2 .. 8 or a code does not fit.
    """
    _check_bits(bits)
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise UserError(
            f"Codes do not fit in {bits} bits. Choose integers from 0 to {2**bits - 1}."
        )
    count = codes.shape[-1]
    per_unit, unit_bytes = unit(bits)
    codes = F.pad(codes.to(torch.uint8), (0, -count % per_unit)).unflatten(-1, (-1, per_unit))
    packed = codes.new_zeros(*codes.shape[:-1], unit_bytes)
    for index in range(per_unit):
        byte, shift = divmod(index * bits, 8)
        packed[..., byte] |= codes[..., index] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= codes[..., index] >> (8 - shift)
    return packed.flatten(-2)[..., : packed_width(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Returns the codes that `pack` packed.

    Args:
        packed: Packed codes, [..., bytes] uint8.
        bits: Bit width of the codes.
        count: Number of codes in a row.

    Returns:
        Codes, [..., count] uint8.

    Raises:
        UserError: If `bits` is not in 2 .. 8 or a row has not the bytes of `count` codes.
    """
    _check_bits(bits)
    if packed.shape[-1] != packed_width(count, bits):
        raise UserError(
            f"{packed.shape[-1]} bytes are not a row of {count} codes of {bits} bits, which take "
            f"{packed_width(count, bits)} bytes."
        )
    if bits == 8:
        return packed
    per_unit, unit_bytes = unit(bits)
    packed = F.pad(packed, (0, -packed.shape[-1] % unit_bytes)).unflatten(-1, (-1, unit_bytes))
    codes = packed.new_empty(*packed.shape[:-1], per_unit)
    for index in range(per_unit):
        byte, shift = divmod(index * bits, 8)
        code = packed[..., byte] >> shift
        if shift + bits > 8:
            code |= packed[..., byte + 1] << (8 - shift)
        codes[..., index] = code & (2**bits - 1)
    return codes.flatten(-2)[..., :count]


def unit(bits: int) -> tuple[int, int]:
    """Returns the smallest number of codes that fills whole bytes, and the number of bytes."""
    common = math.gcd(8, bits)
    return 8 // common, bits // common


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise UserError(f"bits={bits!r} is not a bit width. Choose an integer from 2 to 8.")

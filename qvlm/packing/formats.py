"""How codes of 2 to 8 bits lie in bytes, and how NormalFloat constants are kept small.

A row of codes is one stream of bits, lowest bit first: code i takes the bits i b to (i + 1) b - 1,
and bit j is bit j mod 8 of byte j div 8. So two INT4 fill a byte (the first the low half), four
INT6 three bytes, INT8 one each; every other width follows the same rule. Each row of the last
dimension starts at a byte of its own and ends with the byte that holds its last code, whose unused
bits are zero: a row of n codes takes ceil(n b / 8) bytes.

Left out: entropy coding, and formats with outliers apart.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qvlm.errors import UserError
from qvlm.quantization.normal_float import NormalFloatQuantizer, dynamic_levels

# Constants that may share an 8-bit scale; 256 is QLoRA's.
_CONSTANT_BLOCKS = (256, 64, 128, 512, 1024, 2048, 4096)


def packed_width(count: int, bits: int) -> int:
    """Bytes that a row of `count` codes takes."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes [..., n] (integers 0 .. 2^bits - 1) to bytes [..., ceil(n bits / 8)], uint8.

    Raises:
        UserError: if bits is not in 2 .. 8 or a code does not fit.
    """
    _check_bits(bits)
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise UserError(f"codes do not fit in bits={bits}: accepted are 0 to {2**bits - 1}")
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
    """The codes [..., count] uint8 that `pack` made these bytes of.

    Raises:
        UserError: if bits is not in 2 .. 8 or the bytes are not those of `count` codes.
    """
    _check_bits(bits)
    if packed.shape[-1] != packed_width(count, bits):
        raise UserError(
            f"{packed.shape[-1]} bytes are no row of {count} codes of {bits} bits: "
            f"accepted are {packed_width(count, bits)}"
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


@dataclass(frozen=True)
class Constants:
    """The constants of NormalFloat blocks, double-quantized where they were.

    Attributes:
        codes: index of each constant's level, [blocks] uint8; None if they are float32.
        largest: what each run of `block_size` levels is multiplied by, [ceil(blocks / size)]; or
            the constants themselves, [blocks].
        mean: what is added, [1]; zero for float32 constants.
        block_size: constants that share an entry of `largest`.
    """

    codes: Tensor | None
    largest: Tensor
    mean: Tensor
    block_size: int

    @classmethod
    def of(cls, quantizer: NormalFloatQuantizer) -> "Constants":
        """Finds the codes behind a quantizer's decoded constants.

        The quantizer does not say how many constants share a scale, so usual sizes are tried. If
        none gives its decoded constants back to the bit, they are kept in float32.
        """
        constants, decoded = quantizer.absmax, quantizer.dequantized_absmax
        mean = constants.mean().view(1)
        for size in () if torch.equal(constants, decoded) else _CONSTANT_BLOCKS:
            offsets = F.pad(constants - mean, (0, -len(constants) % size)).view(-1, size)
            largest = offsets.abs().amax(1)
            per_constant = largest.repeat_interleave(size)[: len(constants)]
            levels = dynamic_levels().to(constants.device)
            near = torch.bucketize((decoded - mean) / per_constant, levels).clamp_max(255)
            for shift in (0, -1, 1):
                moved = (near + shift).clamp(0, 255)
                exact = levels[moved] * per_constant + mean == decoded
                near = torch.where(exact, moved, near)
            found = cls(near.to(torch.uint8), largest, mean, size)
            if torch.equal(found.dequantize(), decoded):
                return found
        return cls(None, decoded, torch.zeros_like(mean), 1)

    def dequantize(self) -> Tensor:
        """The constants [blocks], float32."""
        return dequantize_absmax(self.codes, self.largest, self.mean, self.block_size)


def dequantize_absmax(codes: Tensor | None, largest: Tensor, mean: Tensor, size: int) -> Tensor:
    """The constants [blocks] float32 of `Constants`' four fields."""
    if codes is None:
        return largest
    levels = dynamic_levels().to(codes.device)
    return levels[codes.long()] * largest.repeat_interleave(size)[: len(codes)] + mean


def unit(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and these bytes."""
    common = math.gcd(8, bits)
    return 8 // common, bits // common


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise UserError(f"bits={bits!r}: accepted are whole numbers from 2 to 8")

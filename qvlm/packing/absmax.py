"""How the absmax of NormalFloat blocks is stored: double-quantized, as it was in the quantizer.

A NormalFloat weight is cut into blocks, and each block is scaled by its largest absolute value, its
absmax. Double quantization stores the absmax values less their mean as 8-bit codes, with a nested
absmax for every run of them (bitsandbytes' terms). Packed checkpoints, and therefore `Form` and the
buffers of `PackedLinear`, call an absmax a constant: `constant_codes` are the codes, `scale` the
nested absmax and `mean` the mean.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from qvlm.quantization.normal_float import (
    NormalFloatQuantizer,
    dynamic_levels,
    mean_absmax,
    normal_float_levels,
)

# Numbers of absmax values that may share a nested absmax. QLoRA's, 256, comes first.
_NESTED_BLOCK_SIZES = (256, 64, 128, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class PackedAbsmax:
    """The absmax of every block of a weight, double-quantized where the quantizer did so.

    Attributes:
        codes: Codes of the absmax values, [blocks] uint8; None if these are kept in float32.
        nested: Nested absmax of each run of codes, [ceil(blocks / nested_block_size)] float32. If
            `codes` is None, the absmax values themselves, [blocks] float32.
        mean: Mean that was subtracted before quantization, [1] float32; zero without codes.
        nested_block_size: Number of codes that share a nested absmax.
    """

    codes: Tensor | None
    nested: Tensor
    mean: Tensor
    nested_block_size: int

    @classmethod
    def of(cls, quantizer: NormalFloatQuantizer) -> "PackedAbsmax":
        """Finds the codes that a quantizer's dequantized absmax was made of.

        The quantizer does not keep the size of its nested blocks, so the usual sizes are tried. If
        none gives the dequantized absmax to the bit, it is stored in float32.
        """
        absmax, dequantized = quantizer.absmax, quantizer.dequantized_absmax
        mean = mean_absmax(absmax).view(1)
        for size in () if torch.equal(absmax, dequantized) else _NESTED_BLOCK_SIZES:
            offsets = F.pad(absmax - mean, (0, -len(absmax) % size)).view(-1, size)
            nested = offsets.abs().amax(1)
            factor = nested.repeat_interleave(size)[: len(absmax)]
            levels = dynamic_levels().to(absmax.device)
            codes = torch.bucketize((dequantized - mean) / factor, levels).clamp_max(255)
            for shift in (0, -1, 1):
                moved = (codes + shift).clamp(0, 255)
                exact = levels[moved] * factor + mean == dequantized
                codes = torch.where(exact, moved, codes)
            found = cls(codes.to(torch.uint8), nested, mean, size)
            if torch.equal(found.dequantize(), dequantized):
                return found
        return cls(None, dequantized, torch.zeros_like(mean), 1)

    def dequantize(self) -> Tensor:
        """Returns the absmax of each block, [blocks] float32."""
        return dequantize_absmax(self.codes, self.nested, self.mean, self.nested_block_size)


def dequantize_absmax(
    codes: Tensor | None, nested: Tensor, mean: Tensor, nested_block_size: int
) -> Tensor:
    """Returns the absmax of each block, [blocks] float32, from the fields of `PackedAbsmax`."""
    if codes is None:
        return nested
    levels = dynamic_levels().to(codes.device)
    return levels[codes.long()] * nested.repeat_interleave(nested_block_size)[: len(codes)] + mean


@cache
def kept_levels(bits: int) -> Tensor:
    """Returns the values of NormalFloat codes, [2^bits] float32 on the CPU, which are made once."""
    return normal_float_levels(bits)


@cache
def kept_absmax_levels() -> Tensor:
    """Returns the values of absmax codes, [256] float32 on the CPU, which are made once."""
    return dynamic_levels()

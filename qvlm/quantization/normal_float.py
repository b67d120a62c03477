"""NormalFloat: codebooks whose levels are quantiles of the normal distribution.

QLoRA (arXiv 2305.14314), section 3:

    w_hat = level[code] * absmax        absmax = max |w| of 64 neighbors in the flattened weight

Double quantization stores the absmax values, less their mean, as 8-bit codes in blocks of 256. Each
of these blocks has a nested absmax in float32. The absmax then costs 0.127 bits per weight instead
of 0.5.

At 4 bits every result equals, bit for bit, what bitsandbytes 0.50 computes on a CPU once the mean
of the absmax values is the same (see `mean_absmax`), so that the baseline is the one that people
know. Comments mark the quirks of bitsandbytes that this takes. The other widths are the same
construction with 2^b levels.

Not here: packing two codes into a byte, and the slightly different rounding of the CUDA kernels.
"""

import torch
from torch import Tensor

from qvlm import validation
from qvlm.bits import MAX_BITS, MIN_BITS
from qvlm.quantization.quantizer import Quantizer

# bitsandbytes' bound: the reciprocal of anything smaller would overflow.
_SMALLEST_ABSMAX = 1e-38
_LARGEST = torch.finfo(torch.float32).max


def normal_float_levels(bits: int) -> Tensor:
    """Makes the 2^bits levels: float32, ascending, from -1 to 1, with an exact zero.

    The 2^(b-1) positive and 2^(b-1) - 1 negative levels are quantiles of N(0, 1), evenly spaced in
    probability between one half and `top` and scaled to end at one (QLoRA, arXiv 2305.14314,
    eq. 4 and appendix E). `top` leaves half a bin outside: 1 - (1/(2 n) + 1/(2 (n - 1))) / 2 for
    n = 2^b levels. It is rounded to seven digits, as in the published code, since the last bits of
    NF4 differ otherwise.

    Raises:
        UserError: If `bits` is not in 2 .. 8.
    """
    validation.whole_number("bits", bits, MIN_BITS, MAX_BITS)
    count, half = 2**bits, 2 ** (bits - 1)
    top = round(1 - (1 / (2 * count) + 1 / (2 * (count - 1))) / 2, 7)
    positive = _normal_quantiles(_evenly_spaced(top, 0.5, half + 1)[:-1])
    negative = -_normal_quantiles(_evenly_spaced(top, 0.5, half)[:-1])
    levels = torch.cat([negative, torch.zeros(1), positive]).sort().values
    return levels / levels.max()


def dynamic_levels() -> Tensor:
    """Makes the 256 levels of the signed dynamic 8-bit type (arXiv 1511.04561): float32, ascending.

    There are seven decades below one. Decade d, counted from the smallest, has 2^d levels of each
    sign: the means of neighbors among evenly spaced numbers from a tenth to one, times the decade.
    Zero and one complete the levels; minus one is missing.
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        ends = _evenly_spaced(0.1, 1, 2**decade + 1)
        # Scaled in float32, like the published table. Float64 would differ in the last bits.
        means = 10 ** (decade - 6) * ((ends[:-1] + ends[1:]) / 2)
        levels += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(levels))


class NormalFloatQuantizer(Quantizer):
    """The NormalFloat quantizer of one weight; `from_weight` makes it.

    Attributes:
        levels: Codebook [2^bits], float32, ascending.
        block_size: Number of neighbors in the flattened weight that share an absmax.
        absmax: Largest |w| of each block, [blocks] float32, before double quantization. Codes
            depend on it.
        dequantized_absmax: What double quantization makes of `absmax`, [blocks] float32. Values
            depend on it. An absmax that is small beside its neighbors may change its sign, as in
            bitsandbytes.
    """

    levels: Tensor
    absmax: Tensor
    dequantized_absmax: Tensor

    def __init__(
        self, bits: int, block_size: int, absmax: Tensor, dequantized_absmax: Tensor
    ) -> None:
        super().__init__(bits)
        self.block_size = block_size
        self.register_buffer("levels", normal_float_levels(bits).to(absmax.device))
        self.register_buffer("absmax", absmax)
        self.register_buffer("dequantized_absmax", dequantized_absmax)

    @classmethod
    def from_weight(
        cls, weight: Tensor, bits: int, block_size: int = 64, nested_block_size: int | None = 256
    ) -> "NormalFloatQuantizer":
        """Makes the quantizer of a finite weight of any shape.

        Args:
            weight: Weight to be quantized.
            bits: Number of bits, 2 to 8.
            block_size: Number of neighbors in the flattened weight that share an absmax. The last
                block may be smaller.
            nested_block_size: Number of absmax values that share an 8-bit scale. None keeps the
                absmax in float32.

        Raises:
            UserError: If `bits` is outside 2 .. 8 or a size is below 1.
        """
        validation.whole_number("block_size", block_size)
        if nested_block_size is not None:
            validation.whole_number("nested_block_size", nested_block_size)
        flat = weight.detach().float().flatten()
        absmax = _blocks(flat, block_size).abs().amax(1)
        if len(flat) % block_size:
            absmax[-1].clamp_min_(_SMALLEST_ABSMAX)  # bitsandbytes clamps a smaller last block only
        dequantized = absmax
        if nested_block_size is not None:
            dequantized = _double_quantized(absmax, nested_block_size)
        return cls(bits, block_size, absmax, dequantized)

    def quantize(self, x: Tensor) -> Tensor:
        """Looks up the codes of `x`, which has as many elements as the weight.

        A code is that of the level nearest to x / absmax; half way between two levels, the lower
        one. Values that `dequantize` returned get their own codes back: they are looked up with
        the dequantized absmax, because divided by the float absmax they may be nearer to another
        level. Blocks whose absmax is below 1e-38 are the exception.
        """
        flat = x.detach().float().flatten()
        scaled = _blocks(flat, self.block_size)
        by_absmax = scaled * (1 / self.absmax.clamp_min(_SMALLEST_ABSMAX))[:, None]
        if len(flat) % self.block_size:
            # bitsandbytes divides the smaller last block where it multiplies full ones with a
            # reciprocal.
            by_absmax[-1] = scaled[-1] / self.absmax[-1].clamp_min(_SMALLEST_ABSMAX)
        codes = self._nearest(by_absmax)
        dequantized = self.dequantized_absmax[:, None]
        own = self._nearest(scaled / dequantized)
        returned = self.levels[own] * dequantized == scaled
        codes = torch.where(returned & (dequantized.abs() >= _SMALLEST_ABSMAX), own, codes)
        return codes.flatten()[: len(flat)].view(x.shape).to(torch.uint8)

    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Maps codes to their values, which are products in float32 whatever type they have."""
        blocks = _blocks(codes.flatten(), self.block_size)
        values = self.levels[blocks.long()] * self.dequantized_absmax[:, None]
        return values.flatten()[: codes.numel()].view(codes.shape).to(dtype)

    def group_index(self, x: Tensor) -> Tensor:
        """The block of each element, of the shape of `x`."""
        return (torch.arange(x.numel(), device=x.device) // self.block_size).view(x.shape)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, block_size={self.block_size}, blocks={len(self.absmax)}"

    def _nearest(self, scaled: Tensor) -> Tensor:
        """The index of the level nearest to each value; NaN (0 / 0) counts as zero."""
        between = (self.levels[:-1] + self.levels[1:]) / 2
        return torch.bucketize(scaled.nan_to_num(0).clamp(-1, 1), between)


def _double_quantized(absmax: Tensor, block_size: int) -> Tensor:
    """The absmax [blocks] after 8-bit quantization of its distance to its mean.

    A dynamic level is looked up by way of 2^16 evenly spaced values, so the code may be that of the
    second-nearest level, as in bitsandbytes on a CPU.
    """
    mean = mean_absmax(absmax)
    offsets = _blocks(absmax - mean, block_size)
    nested_absmax = offsets.abs().amax(1, keepdim=True)
    # Zero divided by a zero nested absmax may get any code: its value is multiplied by zero.
    scaled = (offsets * (1 / nested_absmax)).nan_to_num(0).clamp(-1, 1)
    entry = ((scaled + 1) * 0.5 * (2**16 - 1) + 0.5).trunc()
    levels = dynamic_levels().to(absmax.device)
    codes = torch.bucketize(2 * entry / (2**16 - 1) - 1, 0.5 * (levels[:-1] + levels[1:]))
    dequantized = (levels[codes] * nested_absmax).flatten()[: len(absmax)] + mean
    return dequantized.clamp(-_LARGEST, _LARGEST)


def mean_absmax(absmax: Tensor) -> Tensor:
    """The mean of absmax values, summed in float64, so that its float32 is that of any machine.

    bitsandbytes sums in float32, whose last bit depends on the order of the terms.
    """
    return absmax.double().mean().float()


def _blocks(flat: Tensor, size: int) -> Tensor:
    """Reshapes [n] to [ceil(n / size), size]; zeros fill the last row."""
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)


def _evenly_spaced(start: float, end: float, count: int) -> Tensor:
    """The float32 numbers of `torch.linspace` on a CPU with fused multiply-add, on any machine.

    Without fused multiply-add `torch.linspace` rounds twice, and other tables come out of it.
    """
    first, last = torch.tensor([start, end], dtype=torch.float32)
    step, index = ((last - first) / (count - 1)).double(), torch.arange(count)
    up, down = first.double() + step * index, last.double() - step * (count - 1 - index)
    return torch.where(index < count // 2, up, down).float()


def _normal_quantiles(probabilities: Tensor) -> Tensor:
    return torch.special.ndtri(probabilities.double()).float()

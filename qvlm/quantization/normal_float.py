"""NormalFloat: codebooks whose levels are quantiles of the normal distribution (QLoRA, section 3).

    w_hat = level[code] * c        c = max |w| over a block of 64 neighbours of the flattened weight

The constants c are quantized too (double quantization): less their mean, they are coded with 8 bits
in blocks of 256, so that they cost 0.127 bits per weight instead of 0.5.

For 4 bits everything here, roundings included, is what bitsandbytes 0.50 computes on a CPU, to the
bit: a baseline that people know should be the one they know. Its quirks are therefore kept, and are
marked below. The other widths are the same construction with 2^b levels.

Left out: packing two codes into a byte, and the CUDA kernels' slightly different rounding.
"""

import torch
from torch import Tensor

from qvlm.errors import UserError
from qvlm.quantization.quantizer import Quantizer

# Below, a reciprocal would overflow. The value is bitsandbytes'.
_SMALLEST_CONSTANT = 1e-38
_LARGEST = torch.finfo(torch.float32).max


def normal_float_levels(bits: int) -> Tensor:
    """The 2^bits levels in ascending order, from -1 to 1 and with an exact zero, float32.

    2^(b-1) positive and 2^(b-1) - 1 negative levels are quantiles of N(0, 1), evenly spaced in
    probability between one half and `top`, and scaled to end at one (QLoRA, arXiv 2305.14314,
    eq. 4 and appendix E). `top` leaves half a bin outside: 1 - (1/(2 n) + 1/(2 (n - 1))) / 2 for
    n = 2^b levels, rounded to seven digits as in the published code; with more of them the last
    bits of NF4 differ.

    Raises:
        UserError: if bits is not in 2 .. 8.
    """
    if not 2 <= bits <= 8:
        raise UserError(f"bits={bits!r}: a NormalFloat has from 2 to 8")
    count, half = 2**bits, 2 ** (bits - 1)
    top = round(1 - (1 / (2 * count) + 1 / (2 * (count - 1))) / 2, 7)
    positive = _normal_quantiles(torch.linspace(top, 0.5, half + 1)[:-1])
    negative = -_normal_quantiles(torch.linspace(top, 0.5, half)[:-1])
    levels = torch.cat([negative, torch.zeros(1), positive]).sort().values
    return levels / levels.max()


def dynamic_levels() -> Tensor:
    """The 256 levels of the signed dynamic 8-bit type (arXiv 1511.04561), ascending, float32.

    Seven decades below one; each coarser one has half as many levels as the next, the means of
    evenly spaced neighbours between a tenth and one. Zero and one complete them; minus one is
    missing.
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        ends = torch.linspace(0.1, 1, 2**decade + 1)
        # Scaled in float32, like the published table: double precision would differ in last bits.
        means = 10 ** (decade - 6) * ((ends[:-1] + ends[1:]) / 2)
        levels += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(levels))


class NormalFloatQuantizer(Quantizer):
    """The NormalFloat quantizer of one weight: see `fit`.

    Attributes:
        levels: [2^bits], ascending.
        block_size: neighbours in the flattened weight that share a constant.
        constants: max |w| of each block before it is quantized, [blocks]; codes depend on it.
        dequantized_absmax: what is left of it after double quantization, [blocks]; values do. A
            constant that is small beside its neighbours may change its sign (so it does in
            bitsandbytes).
    """

    levels: Tensor
    constants: Tensor
    dequantized_absmax: Tensor

    def __init__(
        self, bits: int, block_size: int, constants: Tensor, dequantized_absmax: Tensor
    ) -> None:
        super().__init__(bits)
        self.block_size = block_size
        self.register_buffer("levels", normal_float_levels(bits).to(constants.device))
        self.register_buffer("constants", constants)
        self.register_buffer("dequantized_absmax", dequantized_absmax)

    @classmethod
    def fit(
        cls, weight: Tensor, bits: int, block_size: int = 64, constant_block_size: int | None = 256
    ) -> "NormalFloatQuantizer":
        """The quantizer of a finite weight of any shape.

        Args:
            block_size: neighbours in the flattened weight that share a constant; the last block
                may be smaller.
            constant_block_size: constants that share an 8-bit scale; None leaves them float32.

        Raises:
            UserError: for bits outside 2 .. 8 or a size below 1.
        """
        for name, size in (
            ("block_size", block_size),
            ("constant_block_size", constant_block_size),
        ):
            if size is not None and size < 1:
                raise UserError(f"{name}={size!r}: accepted are whole numbers from 1")
        flat = weight.detach().float().flatten()
        constants = _blocks(flat, block_size).abs().amax(1)
        if len(flat) % block_size:
            constants[-1].clamp_min_(_SMALLEST_CONSTANT)  # of a last, smaller block only
        decoded = constants
        if constant_block_size is not None:
            decoded = _double_quantized(constants, constant_block_size)
        return cls(bits, block_size, constants, decoded)

    def quantize(self, x: Tensor) -> Tensor:
        """Codes of `x`, which is as large as the fitted weight.

        The nearest level of x / c; half way between two, the lower. Values that `decode` gave get
        the codes of the same values back: they are looked up with their decoded constant, because
        against the float one they may be nearer to another level. (Not so in blocks whose constant
        is below 1e-38.)
        """
        flat = x.detach().float().flatten()
        scaled = _blocks(flat, self.block_size)
        by_constant = scaled * (1 / self.constants.clamp_min(_SMALLEST_CONSTANT))[:, None]
        if len(flat) % self.block_size:
            # The last, smaller block is divided where full ones take a reciprocal.
            by_constant[-1] = scaled[-1] / self.constants[-1].clamp_min(_SMALLEST_CONSTANT)
        codes = self._nearest(by_constant)
        decoded = self.dequantized_absmax[:, None]
        known = self._nearest(scaled / decoded)
        kept = (self.levels[known] * decoded == scaled) & (decoded.abs() >= _SMALLEST_CONSTANT)
        codes = torch.where(kept, known, codes)
        return codes.flatten()[: len(flat)].view(x.shape).to(torch.uint8)

    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        blocks = _blocks(codes.flatten(), self.block_size)
        values = self.levels.to(dtype)[blocks.long()] * self.dequantized_absmax[:, None]
        return values.flatten()[: codes.numel()].view(codes.shape)

    def group_index(self, x: Tensor) -> Tensor:
        """The block of each element, of the shape of `x`."""
        return (torch.arange(x.numel(), device=x.device) // self.block_size).view(x.shape)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, block_size={self.block_size}, blocks={len(self.constants)}"

    def _nearest(self, scaled: Tensor) -> Tensor:
        """The index of the level nearest to each value; NaN (0 / 0) counts as zero."""
        between = (self.levels[:-1] + self.levels[1:]) / 2
        return torch.bucketize(scaled.nan_to_num(0).clamp(-1, 1), between)


def _double_quantized(constants: Tensor, block_size: int) -> Tensor:
    """Constants [blocks] after 8-bit quantization of their distance to their mean.

    The dynamic levels are found by way of a table of 2^16 evenly spaced values, so a code may be
    that of the second-nearest level (as in bitsandbytes on a CPU).
    """
    mean = constants.mean()
    if not bool(torch.isfinite(mean)):  # the sum overflowed; the mean itself cannot
        mean = constants.double().mean().float()
    offsets = _blocks(constants - mean, block_size)
    largest = offsets.abs().amax(1, keepdim=True)
    # Zero divided by a zero maximum: any code will do, its value is multiplied by zero.
    scaled = (offsets * (1 / largest)).nan_to_num(0).clamp(-1, 1)
    entry = ((scaled + 1) * 0.5 * (2**16 - 1) + 0.5).trunc()
    levels = dynamic_levels().to(constants.device)
    codes = torch.bucketize(2 * entry / (2**16 - 1) - 1, 0.5 * (levels[:-1] + levels[1:]))
    decoded = (levels[codes] * largest).flatten()[: len(constants)] + mean
    return decoded.clamp(-_LARGEST, _LARGEST)


def _blocks(flat: Tensor, size: int) -> Tensor:
    """[n] as [ceil(n / size), size], the last row filled up with zeros."""
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)


def _normal_quantiles(probabilities: Tensor) -> Tensor:
    return torch.special.ndtri(probabilities.double()).float()

"""The quantizer that all methods share: uniform, asymmetric, 2 to 8 bits.

    q = clamp(round(x / s) + z, 0, 2^b - 1)        x_hat = (q - z) s

A quantizer has a grid (scale s, zero point z) and does not depend on where the grid came from.
Ranges are estimated in `ranges.py`, so that a method can change them and keep the arithmetic.

Every range contains zero. So z is an integer of b bits, which is what packed formats store; zero is
represented exactly; and round(x / s) stays small, so that float32 yields the same integer on every
machine. The price is that a channel whose values are all far from zero spends levels on the gap.
Weights, and activations behind a norm, lie on both sides of zero, so this rarely happens.

Scales are float32. They are at least the smallest normal number and small enough that no (q - z) s
overflows. A range of zero width therefore becomes a grid on which every value is (nearly) zero.

Not here: learned scales, symmetric grids and floating-point formats. Gradients are the subject of
`straight_through.py`.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from qvlm import validation
from qvlm.errors import UserError
from qvlm.quantization.precision import wide
from qvlm.quantization.straight_through import fake_quantize, rounded_steps, with_gradient_of

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# Slightly below the largest float32, so that dividing it by a level count and multiplying back
# cannot round up to infinity.
_LARGEST = torch.finfo(torch.float32).max * (1 - 1e-6)


class Quantizer(nn.Module, ABC):
    """The interface that a quantized linear uses, for uniform grids and codebooks alike.

    A subclass sets `bits` and implements `quantize`, `dequantize` and `group_index`. `forward` is
    `dequantize(quantize(x))` with a straight-through gradient.

    Attributes:
        bits: Number of bits of a code. The elements that share a scale take at most 2^bits values.
        folds: Whether the scales are those of input features and are multiplied into the weight
            before the weight is quantized (see `linear.py`).
    """

    folds: bool = False

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    @abstractmethod
    def quantize(self, x: Tensor) -> Tensor:
        """Maps `x` to its codes: integers 0 .. 2^bits - 1 (uint8), of the shape of `x`."""

    @abstractmethod
    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Maps codes to their values, in float32 or, without rounding to float32, in float64."""

    @abstractmethod
    def group_index(self, x: Tensor) -> Tensor:
        """Numbers the scale of each element of `x`: integers that broadcast to its shape."""

    def for_tokens(self, x: Tensor) -> "Quantizer":
        """Returns a quantizer with stored scales for exactly this `x`; itself if it is static."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes and dequantizes; the gradient is that of the identity.

        The result is float64 if `x` is, and otherwise float32.
        """
        values = self.dequantize(self.quantize(x.detach()))
        return with_gradient_of(x, values.to(wide(x).dtype))


def affine_grid(lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Computes scale and zero point of the ranges [lo, hi], each extended to contain zero.

    Args:
        lo, hi: Finite ends of the ranges, of any shape.
        bits: Number of bits, 2 to 8.

    Returns:
        Scale (float32, positive, finite) and zero point (float32 with integer values in
        0 .. 2^bits - 1), both of the shape of `lo`.
    """
    levels = 2**bits - 1
    lo = lo.float().clamp_max(0)
    hi = hi.float().clamp_min(0)
    # Divides before it subtracts: hi - lo may overflow float32 where neither end does.
    scale = (hi / levels - lo / levels).clamp_min_(SMALLEST_SCALE)
    zero_point = (-lo / scale).round_().clamp_(0, levels)
    longest = torch.maximum(zero_point, levels - zero_point)
    return torch.minimum(scale, _LARGEST / longest), zero_point


class UniformQuantizer(Quantizer):
    """Uniform quantization with stored scales.

    Args:
        bits: Number of bits, 2 to 8.
        scale: Positive, finite steps. They broadcast to `x` or, with `group_size`, to `x` reshaped
            to [..., features / group_size, group_size].
        zero_point: Integers in 0 .. 2^bits - 1, of the shape of `scale`.
        group_size: Number of neighbors along the last dimension that share a scale.
        clusters: Cluster of each channel, [features] integers, where channels share scales without
            being neighbors. `scale` is then [features], with equal entries within a cluster.
        folds: See `Quantizer`.
        order: Channels [features] in the order in which they are grouped. None is their own order.

    Raises:
        UserError: If a scale is not positive and finite.
    """

    scale: Tensor
    zero_point: Tensor
    lowest: Tensor
    highest: Tensor
    clusters: Tensor | None
    order: Tensor | None
    _back: Tensor | None

    def __init__(
        self,
        bits: int,
        scale: Tensor,
        zero_point: Tensor,
        group_size: int | None = None,
        clusters: Tensor | None = None,
        folds: bool = False,
        order: Tensor | None = None,
    ) -> None:
        super().__init__(bits)
        if not bool((torch.isfinite(scale) & (scale >= SMALLEST_SCALE)).all()):
            raise UserError("a quantization scale is not positive and finite")
        self.group_size = group_size
        self.folds = folds
        self.register_buffer("scale", scale.detach().float())
        self.register_buffer("zero_point", zero_point.detach().float())
        self.register_buffer("clusters", clusters)
        self.register_buffer("order", order)
        back = None if order is None else order.argsort(stable=True)
        self.register_buffer("_back", back, persistent=False)
        # Ends of the grid in steps from zero: clamping to them clamps q to 0 .. 2^b - 1.
        self.register_buffer("lowest", -self.zero_point, persistent=False)
        self.register_buffer("highest", 2**bits - 1 - self.zero_point, persistent=False)

    @classmethod
    def from_range(cls, lo: Tensor, hi: Tensor, bits: int, **layout: Any) -> "UniformQuantizer":
        """Makes the quantizer of the ranges [lo, hi]; `layout` is passed to the constructor."""
        scale, zero_point = affine_grid(lo, hi, bits)
        return cls(bits, scale, zero_point, **layout)

    def quantize(self, x: Tensor) -> Tensor:
        steps = rounded_steps(self._grouped(x.float()), self.scale, self.lowest, self.highest)
        return self._ungrouped(steps.add_(self.zero_point)).to(torch.uint8)

    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._ungrouped((self._grouped(codes.to(dtype)) - self.zero_point) * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Computes `dequantize(quantize(x))` in few passes, straight-through inside the range."""
        x = self._grouped(wide(x))
        return self._ungrouped(fake_quantize(x, self.scale, self.lowest, self.highest, True))

    def centered(self, x: Tensor) -> Tensor:
        """Computes q - z: quantized `x` in units of its scale, with the gradient of `forward`."""
        x = self._grouped(wide(x))
        return self._ungrouped(fake_quantize(x, self.scale, self.lowest, self.highest, False))

    def group_index(self, x: Tensor) -> Tensor:
        if self.clusters is not None:
            return self.clusters
        index = torch.arange(self.scale.numel(), device=x.device).view(self.scale.shape)
        if self.group_size is not None:
            index = self._ungrouped(index.expand(*index.shape[:-1], self.group_size))
        return index

    def grids(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each element of `x`, both float32 of its shape."""
        shape = self._grouped(x).shape
        scale, zero_point = self.scale.expand(shape), self.zero_point.expand(shape)
        return self._ungrouped(scale), self._ungrouped(zero_point)

    def with_scales(self, scale: Tensor, zero_point: Tensor) -> "UniformQuantizer":
        """Makes the quantizer with other grids and the same layout."""
        layout = self.group_size, self.clusters, self.folds, self.order
        return UniformQuantizer(self.bits, scale, zero_point, *layout)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, scale={list(self.scale.shape)}, group_size={self.group_size}"

    def _grouped(self, x: Tensor) -> Tensor:
        if self.group_size is None:
            return x
        x = x if self.order is None else x[..., self.order]
        return x.unflatten(-1, (-1, self.group_size))

    def _ungrouped(self, x: Tensor) -> Tensor:
        if self.group_size is None:
            return x
        x = x.flatten(-2)
        return x if self._back is None else x[..., self._back]


class TokenQuantizer(Quantizer):
    """Uniform quantization of activations with one scale per token, computed in the call.

    Args:
        bits: Number of bits, 2 to 8.
        ratio: Clipping ratio. A token's range is its minimum and maximum times this number, which
            is calibrated once instead of being searched in every forward pass.

    Raises:
        UserError: If the ratio is outside (0, 1].
    """

    def __init__(self, bits: int, ratio: float = 1.0) -> None:
        super().__init__(bits)
        if not 0 < ratio <= 1:
            raise validation.refused("clipping ratio", ratio, "a number above 0 and up to 1")
        self.ratio = ratio

    def for_tokens(self, x: Tensor) -> UniformQuantizer:
        """Makes the static quantizer of exactly these tokens: scales [..., 1] for x [..., in]."""
        return UniformQuantizer(self.bits, *self._grid(x.detach().float()))

    def quantize(self, x: Tensor) -> Tensor:
        return self.for_tokens(x).quantize(x)

    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Raises TypeError, since the scales are those of tokens: use `for_tokens(x)`."""
        raise TypeError(
            "a per-token quantizer stores no scales: use for_tokens(x).dequantize(codes)"
        )

    def forward(self, x: Tensor) -> Tensor:
        x = wide(x)
        scale, zero_point = self._grid(x.detach().float())
        return fake_quantize(x, scale, -zero_point, 2**self.bits - 1 - zero_point, True)

    def group_index(self, x: Tensor) -> Tensor:
        return torch.arange(x[..., 0].numel(), device=x.device).view(*x.shape[:-1], 1)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, ratio={self.ratio}"

    def _grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lo, hi = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        return affine_grid(lo * self.ratio, hi * self.ratio, self.bits)

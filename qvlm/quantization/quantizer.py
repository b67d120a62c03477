"""The quantizer that all methods share: uniform, asymmetric, 2 to 8 bits.

    q = clamp(round(x / s) + z, 0, 2^b - 1)        x_hat = (q - z) s

A quantizer knows its grid (scale s, zero point z) and nothing of where the grid came from: ranges
are chosen in `ranges.py`, so that a method can change them without touching the arithmetic.

Every range holds zero. Then z is an integer of b bits, which is what packed formats store; zero is
exact; and round(x / s) stays small, so float32 computes the same integer everywhere. The price is
that a channel which lives far from zero spends levels on the gap; activations behind a norm and
weights straddle zero, so it is rarely paid.

Scales are float32, at least the smallest normal number and small enough that no (q - z) s
overflows. A range of zero width therefore becomes a grid that holds (nearly) zero only.

Gradients pass straight through rounding where the code is not clamped, and are zero elsewhere;
scales are constants to them. What is left out: learned scales, symmetric and float formats.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.errors import UserError

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# A hair below the largest float32, so that dividing it by a level count and multiplying back
# cannot round up to infinity.
_LARGEST = torch.finfo(torch.float32).max * (1 - 1e-6)


class Quantizer(nn.Module, ABC):
    """What a quantized linear needs of a quantizer; uniform grids and codebooks alike.

    A subclass sets `bits` and writes `quantize`, `dequantize` and `group_index`; `forward` is
    `dequantize(quantize(x))` with a straight-through gradient.

    Attributes:
        bits: every scale has at most 2^bits values.
        folds: the scale belongs to input features and is moved into the weight before that is
            quantized (see `linear.py`).
    """

    folds: bool = False

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    @abstractmethod
    def quantize(self, x: Tensor) -> Tensor:
        """Integer codes 0 .. 2^bits - 1 (uint8), same shape as `x`."""

    @abstractmethod
    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values that codes stand for: of float32, or, not rounded to it, of float64."""

    @abstractmethod
    def group_index(self, x: Tensor) -> Tensor:
        """Which scale each element of `x` uses: integers that broadcast to its shape."""

    def for_tokens(self, x: Tensor) -> "Quantizer":
        """The quantizer with stored scales that quantizes exactly this `x`; itself if static."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes and dequantizes; the gradient is that of the identity."""
        x_hat = self.dequantize(self.quantize(x.detach()))
        return _Identity.apply(x, x_hat) if x.requires_grad and torch.is_grad_enabled() else x_hat


def affine_grid(lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the ranges [lo, hi], each extended to hold zero.

    Args:
        lo, hi: finite ends of the ranges, any shape.

    Returns:
        Scale (float32, positive, finite) and zero point (float32 holding integers in
        0 .. 2^bits - 1), of the shape of `lo`.
    """
    levels = 2**bits - 1
    lo = lo.float().clamp_max(0)
    hi = hi.float().clamp_min(0)
    # Dividing before subtracting: hi - lo may be beyond float32 when both are in it.
    scale = (hi / levels - lo / levels).clamp_min_(SMALLEST_SCALE)
    zero_point = (-lo / scale).round_().clamp_(0, levels)
    longest = torch.maximum(zero_point, levels - zero_point)
    return torch.minimum(scale, _LARGEST / longest), zero_point


class UniformQuantizer(Quantizer):
    """Uniform quantization with stored scales.

    Args:
        bits: 2 to 8.
        scale: positive and finite; broadcasts to `x`, or, with `group_size`, to `x` seen as
            [..., features / group_size, group_size].
        zero_point: integers in 0 .. 2^bits - 1, same shape.
        group_size: groups of neighbours along the last dimension share a scale.
        order: [features] the channels in the order in which they are grouped; None is their own.
        clusters: [features] integer cluster of each channel, where channels share scales without
            being neighbours; `scale` is then [features] with equal entries within a cluster.
        folds: see `Quantizer`.

    Raises:
        UserError: if a scale is not positive and finite.
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
            raise UserError("a quantization scale is zero, negative, NaN or infinite")
        self.group_size = group_size
        self.folds = folds
        self.register_buffer("scale", scale.detach().float())
        self.register_buffer("zero_point", zero_point.detach().float())
        self.register_buffer("clusters", clusters)
        self.register_buffer("order", order)
        back = None if order is None else order.argsort()
        self.register_buffer("_back", back, persistent=False)
        # The ends of the grid in units of the scale: clamping there is clamping q in 0 .. 2^b - 1.
        self.register_buffer("lowest", -self.zero_point, persistent=False)
        self.register_buffer("highest", 2**bits - 1 - self.zero_point, persistent=False)

    @classmethod
    def from_range(cls, lo: Tensor, hi: Tensor, bits: int, **layout: Any) -> "UniformQuantizer":
        """The quantizer of the ranges [lo, hi]; `layout` as in the constructor."""
        scale, zero_point = affine_grid(lo, hi, bits)
        return cls(bits, scale, zero_point, **layout)

    def quantize(self, x: Tensor) -> Tensor:
        steps = _steps(self._grouped(x.float()), self.scale, self.lowest, self.highest)
        return self._ungrouped(steps.add_(self.zero_point)).to(torch.uint8)

    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._ungrouped((self._grouped(codes.to(dtype)) - self.zero_point) * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """`dequantize(quantize(x))` in few passes, straight-through inside the range."""
        x = self._grouped(x.float())
        return self._ungrouped(_fake_quantize(x, self.scale, self.lowest, self.highest, True))

    def centered(self, x: Tensor) -> Tensor:
        """q - z, the quantized value in units of its scale, straight-through as `forward`."""
        x = self._grouped(x.float())
        return self._ungrouped(_fake_quantize(x, self.scale, self.lowest, self.highest, False))

    def group_index(self, x: Tensor) -> Tensor:
        if self.clusters is not None:
            return self.clusters
        index = torch.arange(self.scale.numel(), device=x.device).view(self.scale.shape)
        if self.group_size is not None:
            index = self._ungrouped(index.expand(*index.shape[:-1], self.group_size))
        return index

    def with_scales(self, scale: Tensor, zero_point: Tensor) -> "UniformQuantizer":
        """A quantizer of other grids, which the same elements share."""
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
        bits: 2 to 8.
        ratio: the token's minimum and maximum are multiplied by it to get the range: one
            calibrated number instead of a search in every forward pass.

    Raises:
        UserError: if the ratio is outside (0, 1].
    """

    def __init__(self, bits: int, ratio: float = 1.0) -> None:
        super().__init__(bits)
        if not 0 < ratio <= 1:
            raise UserError(f"clipping ratio {ratio!r} is not a number above 0 and up to 1")
        self.ratio = ratio

    def for_tokens(self, x: Tensor) -> UniformQuantizer:
        """The stored-scale quantizer of exactly these tokens: scales [..., 1] for x [..., in]."""
        return UniformQuantizer(self.bits, *self._grid(x.detach().float()))

    def quantize(self, x: Tensor) -> Tensor:
        return self.for_tokens(x).quantize(x)

    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Raises TypeError: the scales went with the tokens; decode with `at(x)`."""
        raise TypeError(
            "a per-token quantizer stores no scales; use for_tokens(x).dequantize(codes)"
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        scale, zero_point = self._grid(x.detach())
        return _fake_quantize(x, scale, -zero_point, 2**self.bits - 1 - zero_point, True)

    def group_index(self, x: Tensor) -> Tensor:
        return torch.arange(x[..., 0].numel(), device=x.device).view(*x.shape[:-1], 1)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, ratio={self.ratio}"

    def _grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lo, hi = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        return affine_grid(lo * self.ratio, hi * self.ratio, self.bits)


def _steps(x: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """clamp(round(x / s), lowest, highest): whole steps from zero.

    minimum and maximum in place are several times faster than clamp with tensor ends on CPU.
    """
    steps = (x / scale).round_()
    torch.maximum(steps, lowest, out=steps)
    return torch.minimum(steps, highest, out=steps)


def _fake_quantize(
    x: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor, scaled: bool
) -> Tensor:
    """Quantized `x` in its own units (`scaled`) or in steps of the scale."""
    if x.requires_grad and torch.is_grad_enabled():
        return _StraightThrough.apply(x, scale, lowest, highest, scaled)
    steps = _steps(x, scale, lowest, highest)
    return steps.mul_(scale) if scaled else steps


class _StraightThrough(torch.autograd.Function):
    """Fake quantization whose gradient is one where the code is not clamped and zero elsewhere."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor, scaled: bool
    ) -> Tensor:
        steps = (x / scale).round_()
        ctx.save_for_backward((steps >= lowest) & (steps <= highest), scale)
        ctx.scaled = scaled
        torch.maximum(steps, lowest, out=steps)
        torch.minimum(steps, highest, out=steps)
        return steps.mul_(scale) if scaled else steps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inside, scale = ctx.saved_tensors
        grad = grads[0] * inside
        return (grad if ctx.scaled else grad / scale), None, None, None, None


class _Identity(torch.autograd.Function):
    """The value of the second argument with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, x_hat: Tensor) -> Tensor:
        return x_hat.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None

"""Rounding to a uniform grid, and what it passes on as its gradient.

The gradient passes straight through rounding where the code is not clamped, and is zero elsewhere.
Scales and zero points are constants to it.
"""

from typing import Any

import torch
from torch import Tensor


def rounded_steps(x: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Computes clamp(round(x / scale), lowest, highest): whole steps from zero, in float32.

    `x` is rounded to float32 before the division (see `precision.py`). minimum and maximum in place
    are several times faster on a CPU than clamp with tensor ends.
    """
    steps = (x.float() / scale).round_()
    torch.maximum(steps, lowest, out=steps)
    return torch.minimum(steps, highest, out=steps)


def fake_quantize(
    x: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor, scaled: bool
) -> Tensor:
    """Quantizes and dequantizes `x`, with a straight-through gradient where one is needed.

    Args:
        x: Values of any shape in float32 or float64, which is the type of the result. Products of
            steps and scales are exact in float64.
        scale: Step of the grid; broadcasts to `x`, as do the ends.
        lowest, highest: Ends of the grid in steps from zero.
        scaled: Whether the result is in the units of `x`; otherwise it is in steps of the scale.
    """
    if x.requires_grad and torch.is_grad_enabled():
        return _StraightThrough.apply(x, scale, lowest, highest, scaled)
    steps = rounded_steps(x, scale, lowest, highest).to(x.dtype)
    return steps.mul_(scale) if scaled else steps


def with_gradient_of(x: Tensor, value: Tensor) -> Tensor:
    """Returns `value`, with the gradient of `x` where one is needed."""
    return _Identity.apply(x, value) if x.requires_grad and torch.is_grad_enabled() else value


class _StraightThrough(torch.autograd.Function):
    """Fake quantization whose gradient is one where the code is not clamped and zero elsewhere."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor, scaled: bool
    ) -> Tensor:
        steps = (x.float() / scale).round_()
        ctx.save_for_backward((steps >= lowest) & (steps <= highest), scale)
        ctx.scaled = scaled
        torch.maximum(steps, lowest, out=steps)
        steps = torch.minimum(steps, highest, out=steps).to(x.dtype)
        return steps.mul_(scale) if scaled else steps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inside, scale = ctx.saved_tensors
        grad = grads[0] * inside
        return (grad if ctx.scaled else grad / scale), None, None, None, None


class _Identity(torch.autograd.Function):
    """The value of the second argument with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None

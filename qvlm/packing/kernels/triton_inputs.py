"""Inputs of the products in `triton_products`: an input is quantized once, chunk by chunk.

A launch reads an input in the order of the stored channels and writes its integers in planes. Two
INT4 codes of a weight share a byte, so plane 0 holds the channels of all low halves and plane 1
those of all high halves. The codes of a 32-bit word then multiply neighbors in each plane, and no
code is moved. A weight of 8 bits needs one plane.

What makes the input may be part of the launch: a gated activation, or the sum with a residual and
its RMS norm.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qvlm.packing.kernels.triton_kernels import jit, tl, triton
from qvlm.packing.kernels.triton_launch import overlapping, wait

# What the input of `_quantize` is made of: `quantize`, `quantize_gated` or `quantize_normed`.
PLAIN, GATED, NORMED = 0, 1, 2
# Scale and zero point of an input: [] or [in] with channels as they are stored, or [rows, 1] for
# scales of tokens. The scale is float32. A static zero point may have any type.
Grid = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class InputLayout:
    """How the integers of an input are laid out for a layer.

    Attributes:
        bits: Number of bits of the input.
        planes: Number of planes: 2 for weights of 4 bits, 1 for weights of 8 bits.
        chunk: Number of channels of a chunk.
        order: Channel that each stored channel is, [in] int32; None if channels are stored in
            their own order.
    """

    bits: int
    planes: int
    chunk: int
    order: Tensor | None


def token_grid(x: Tensor, bits: int, ratio: float) -> Grid:
    """Returns scale and zero point of each row of x [rows, in], both [rows, 1] float32.

    They are equal to those of `affine_grid` for the extremes of the row times `ratio`.
    """
    rows, width = x.shape
    scale, zero_point = torch.empty(2, rows, 1, device=x.device)
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        _token_grid[(rows,)](x, scale, zero_point, width, ratio, BITS=bits, BLOCK=block)
    return scale, zero_point


def quantize(x: Tensor, grid: Grid, layout: InputLayout) -> tuple[Tensor, Tensor]:
    """Quantizes an input.

    Args:
        x: Input of any floating-point type with at least one row, [rows, in].
        grid: Scale and zero point.
        layout: Layout of the integers.

    Returns:
        Integers q' of `triton_products`, [rows, planes, in / planes] int8, and the sums of the
        steps of each chunk, [chunks, rows] float32. A sum is NaN where its chunk holds NaN or
        infinity.
    """
    q, sums = _empty(x, layout)
    _launch(x, grid, layout, q, sums)
    return q, sums


def quantize_gated(
    gate: Tensor, up: Tensor, grid: Grid, layout: InputLayout
) -> tuple[Tensor, Tensor]:
    """Quantizes silu(gate) * up, see `quantize`.

    Args:
        gate, up: Tensors [rows, in], whose rows need not be adjacent in memory.
        grid, layout: As for `quantize`.
    """
    q, sums = _empty(gate, layout)
    _launch(gate, grid, layout, q, sums, source=GATED, other=up)
    return q, sums


def quantize_normed(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    epsilon: float,
    grid: Grid,
    layout: InputLayout,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes the RMS norm of x + delta, see `quantize`.

    Args:
        x, delta: Tensors [rows, in]; without `delta`, the norm of `x`.
        weight: Weight of the norm, [in].
        epsilon: Number that the norm adds to the mean of squares.
        grid, layout: As for `quantize`.

    Returns:
        x + delta, [rows, in], and what `quantize` returns.
    """
    q, sums = _empty(x, layout)
    added = x if delta is None else torch.empty_like(x)
    norm = weight, added, epsilon
    _launch(x, grid, layout, q, sums, source=NORMED, other=delta, norm=norm)
    return added, q, sums


def dequantized(
    x: Tensor, grid: Grid, layout: InputLayout, folds: bool, dtype: torch.dtype
) -> Tensor:
    """Returns x_hat of an input in planes, [rows, planes, in / planes] of `dtype`.

    Args:
        x: Input [rows, in].
        grid, layout: As for `quantize`.
        folds: Whether the scale is folded into the weight, so that steps are not multiplied by it.
        dtype: Floating-point type of the result.
    """
    x_hat = torch.empty(*_empty_shape(x, layout), dtype=dtype, device=x.device)
    _launch(x, grid, layout, x_hat, x_hat, folds)
    return x_hat


def _empty_shape(x: Tensor, layout: InputLayout) -> tuple[int, int, int]:
    return len(x), layout.planes, x.shape[1] // layout.planes


def _empty(x: Tensor, layout: InputLayout) -> tuple[Tensor, Tensor]:
    q = torch.empty(*_empty_shape(x, layout), dtype=torch.int8, device=x.device)
    return q, torch.empty(x.shape[1] // layout.chunk, len(x), device=x.device)


def _launch(
    x: Tensor,
    grid: Grid,
    layout: InputLayout,
    q: Tensor,
    sums: Tensor,
    folds: bool = False,
    source: int = PLAIN,
    other: Tensor | None = None,
    norm: tuple[Tensor | None, Tensor | None, float] = (None, None, 0.0),
) -> None:
    (rows, width), (scale, zero_point) = x.shape, grid
    chunks = width // layout.chunk
    block = 4 if rows <= 16 else 16
    weight, added, epsilon = norm
    with torch.cuda.device_of(x):
        _quantize[(rows, triton.cdiv(chunks, block))](
            x,
            layout.order,
            scale,
            zero_point,
            q,
            sums,
            rows,
            width,
            chunks,
            min(scale.ndim, 1),
            x.stride(0),
            other,
            width if other is None else other.stride(0),
            weight,
            added,
            epsilon,
            TOKEN=scale.ndim == 2,
            ORDERED=layout.order is not None,
            FOLDS=folds,
            INPUT_BITS=layout.bits,
            PLANES=layout.planes,
            CHUNK=layout.chunk,
            BLOCK=block,
            SOURCE=source,
            ADD=source == NORMED and other is not None,
            WHOLE=triton.next_power_of_2(width) if source == NORMED else 1,
            num_warps=8 if source == NORMED else 4,
            **overlapping(x.device),
        )


@jit
def _grid_of(lo, hi, BITS: tl.constexpr):
    """Returns scale and zero point as `affine_grid` does, for a range that holds zero."""
    LEVELS: tl.constexpr = 2**BITS - 1
    levels = tl.full([], LEVELS, tl.float32)
    scale = tl.div_rn(hi, levels) - tl.div_rn(lo, levels)
    scale = tl.maximum(scale, 1.1754943508222875e-38)
    zero = (tl.minimum(tl.maximum(tl.div_rn(-lo, scale), 0.0), LEVELS) + 12582912.0) - 12582912.0
    longest = tl.maximum(zero, LEVELS - zero)
    return tl.minimum(
        scale, tl.div_rn(tl.full([], 3.402820018375656e38, tl.float32), longest)
    ), zero


@jit
def _token_grid(x_at, scale_at, zero_at, width, ratio, BITS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    x = tl.load(x_at + row * width + channel, mask=channel < width, other=0).to(tl.float32)
    lo, hi = tl.min(x, 0) * ratio, tl.max(x, 0) * ratio
    scale, zero = _grid_of(lo, hi, BITS)
    tl.store(scale_at + row, scale)
    tl.store(zero_at + row, zero)


@jit
def _quantize(
    x_at,
    order_at,
    scale_at,
    zero_at,
    q_at,
    sums_at,
    rows,
    width,
    chunks,
    scale_stride,
    x_stride,
    other_at,
    other_stride,
    weight_at,
    added_at,
    epsilon,
    TOKEN: tl.constexpr,
    ORDERED: tl.constexpr,
    FOLDS: tl.constexpr,
    INPUT_BITS: tl.constexpr,
    PLANES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    SOURCE: tl.constexpr,
    ADD: tl.constexpr,
    WHOLE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Writes q' and the sums of steps for chunks of a row, or x_hat where `q_at` holds floats.

    See `triton_kernels._input_steps` for the rounding. Values of the model's type are rounded to it
    where transformers rounds them.
    """
    kind = x_at.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    inside = channel < width
    x_row, other_row = x_at + row * x_stride, other_at
    if SOURCE == 1 or ADD:
        other_row = other_at + row * other_stride
    # These were not written by the previous launch.
    source = channel
    if ORDERED:
        source = tl.load(order_at + channel, mask=inside, other=0)
    if not TOKEN:
        scale = tl.load(scale_at + channel * scale_stride, mask=inside, other=1)
        zero = tl.load(zero_at + channel * scale_stride, mask=inside, other=0).to(tl.float32)
    if SOURCE == 2:
        weight = tl.load(weight_at + source, mask=inside, other=0)
    wait(OVERLAP)
    x = tl.load(x_row + source, mask=inside, other=0).to(tl.float32)
    if SOURCE == 1:
        up = tl.load(other_row + source, mask=inside, other=0)
        x = ((x * tl.sigmoid(x)).to(kind) * up).to(kind).to(tl.float32)
    if SOURCE == 2:
        column = tl.arange(0, WHOLE)
        if ADD:
            x += tl.load(other_row + source, mask=inside, other=0).to(tl.float32)
            x = x.to(kind).to(tl.float32)
        whole = tl.load(x_row + column, mask=column < width, other=0).to(tl.float32)
        if ADD:
            whole += tl.load(other_row + column, mask=column < width, other=0).to(tl.float32)
            whole = whole.to(kind).to(tl.float32)
            own = (column // (BLOCK * CHUNK) == tl.program_id(1)) & (column < width)
            tl.store(added_at + row * width + column, whole.to(kind), mask=own)
        length = tl.rsqrt(tl.sum(whole * whole, 0) / width + epsilon)
        x = ((x * length).to(kind) * weight).to(kind).to(tl.float32)
    if TOKEN:
        scale = tl.load(scale_at + row + 0 * channel)
        zero = tl.load(zero_at + row + 0 * channel).to(tl.float32)
    steps = tl.div_rn(x, scale)
    steps = tl.minimum(tl.maximum(steps, -zero), 2**INPUT_BITS - 1 - zero)
    steps = (steps + 12582912.0) - 12582912.0
    at = q_at + row * width + channel % PLANES * (width // PLANES) + channel // PLANES
    if q_at.dtype.element_ty == tl.int8:
        sums = tl.sum(steps + x * 0.0, 1)
        if INPUT_BITS == 8:
            steps += zero - 128
        tl.store(at, steps.to(tl.int32).to(tl.int8), mask=inside)
        tl.store(sums_at + chunk * rows + row, sums, mask=chunk < chunks)
    else:
        if not FOLDS:
            steps *= scale
        tl.store(at, (steps + x * 0.0).to(q_at.dtype.element_ty), mask=inside)

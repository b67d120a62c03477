"""Products of the kernel `triton` on a GPU: input and weight are expanded in registers.

In the notation of `base.py`, where all channels of a weight group g share the input's scale c_g,
both products are

    y = d sum_g c_g s_g (sum_{k in g} t_k v_k) + b

whose inner sums are exact in int32. They are taken in tiles that end where a weight group ends. A
sum over a tile is at most 2^24, so float32 holds it; everything outside the brackets is float32.

`_prefill` multiplies tiles of rows on int8 tensor cores. At 8 bits an operand is q - 128 instead of
q - z, and sums over the other operand make up for the difference, as in `int_mm`. An input tile is
quantized again for every tile of outputs; in return its codes are never stored.

`_decode` serves up to `DECODING_ROWS` rows, where most time is spent on reading the weight. Each
program multiplies one row in int32 on ordinary cores. Programs of the same outputs and different
rows run side by side, so the weight is fetched from memory once.

Weights of 2 to 8 bits are served alike. The positions of codes in bytes repeat in every unit (one
byte for INT4 and INT8, three for INT6, see `formats.unit`), so the loop runs over the places in a
unit, and a tile consists of the codes in one place of many units. Left out: NormalFloat, channels
of one weight group that differ in scale (unless it is folded), groups that begin inside a unit, and
splitting long sums among programs.

Under Triton's interpreter (TRITON_INTERPRET=1) the same code runs on a CPU. It was tested that way,
and by compiling it for compute capability 8.0 and 9.0. The faster products of `triton_products.py`,
which ran on an H100 (results/gpu.md), serve most layers. Those of this file have not run on a GPU.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qvlm.packing.formats import unit

try:
    import triton
    from triton import language as tl
except ImportError:  # `obstacle` reports it, and nothing else here is called
    triton = None

DECODING_ROWS = 4
CAPABILITY = (8, 0)  # the first for which Triton puts int8 products on tensor cores


@cache
def obstacle(device: torch.device) -> str | None:
    """Returns why the products here cannot run on a device, or None."""
    if triton is None:
        return "Triton is not installed"
    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return "it is not on a GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"the GPU's compute capability is {capability}, below {CAPABILITY}"
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # a missing compiler or driver may raise anything
        return f"Triton does not start: {str(error).strip().splitlines()[0]}"
    return None


def linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    input_bits: int,
    codes: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    weight_bits: int,
    group_size: int,
    folds: bool = False,
    clusters: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """Quantizes an input, multiplies it with a packed weight, transposed, and adds the bias.

    Args:
        x: Finite input in any floating-point type, [rows, in].
        scale, zero_point: Grid of the input in float32: [] or [in], or [rows, 1] per token. Scales
            [in] must be equal, unless they are folded or `clusters` is true.
        input_bits: Bit width of the input's codes.
        codes: Packed codes of the weight, [out, bytes] uint8, as `formats` describes them.
        weight_scale, weight_zero_point: Grid of the weight, [out or 1, groups] float32 and uint8.
        weight_bits: Bit width of the weight's codes.
        group_size: Number of channels in a weight group. It is a multiple of the codes in a unit,
            unless there is one group.
        folds: Whether the input's scale is folded, so that the output is not multiplied by it.
        clusters: Whether scales [in] are equal within each weight group only.
        bias: Bias, [out] float32.

    Returns:
        Output in the dtype of `x`, [rows, out].
    """
    x = x.contiguous()
    (rows, width), out = x.shape, len(codes)
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    per_unit, unit_bytes = unit(weight_bits)
    units = triton.next_power_of_2(triton.cdiv(group_size, per_unit))
    if rows <= DECODING_ROWS:
        kernel, block_rows, block_units = _decode, 1, min(units, 256)
    else:
        kernel, block_rows = _prefill, min(max(triton.next_power_of_2(rows), 16), 128)
        block_units = min(max(units, 32), 64)

    def grid(chosen: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(rows, block_rows), triton.cdiv(out, chosen["BLOCK_OUT"])

    with torch.cuda.device_of(x):
        kernel[grid](
            x,
            scale,
            zero_point,
            codes,
            weight_scale,
            weight_zero_point,
            bias,
            y,
            rows,
            width,
            out,
            codes.shape[1],
            group_size,
            weight_scale.shape[1],
            weight_scale.shape[1] if len(weight_scale) > 1 else 0,
            min(scale.ndim, 1),
            TOKEN=scale.ndim == 2,
            FOLDS=folds,
            CLUSTERS=clusters,
            BIAS=bias is not None,
            INPUT_BITS=input_bits,
            BITS=weight_bits,
            PER_UNIT=per_unit,
            UNIT_BYTES=unit_bytes,
            BLOCK_ROWS=block_rows,
            BLOCK_UNITS=block_units,
        )
    return y


def jit(function: Callable[..., Any]) -> Any:
    return function if triton is None else triton.jit(function)


@jit
def _input_steps(
    x_at,
    scale_at,
    zero_at,
    row,
    channel,
    rows,
    width,
    end,
    scale_stride,
    TOKEN: tl.constexpr,
    INPUT_BITS: tl.constexpr,
):
    """Returns q - z of x[row, channel], zero beyond `rows` and `end`, and z. Both are int32.

    Steps are clamped before they are rounded, which gives the same. Adding 1.5 * 2^23 leaves no
    bits for a fraction, so the sum is rounded half to even. The division is correctly rounded, as
    in PyTorch.
    """
    x = tl.load(x_at + row * width + channel, mask=(row < rows) & (channel < end), other=0)
    if TOKEN:
        scale = tl.load(scale_at + row, mask=row < rows, other=1)
        zero = tl.load(zero_at + row, mask=row < rows, other=0).to(tl.float32)
    else:
        scale = tl.load(scale_at + channel * scale_stride, mask=channel < end, other=1)
        zero = tl.load(zero_at + channel * scale_stride, mask=channel < end, other=0).to(tl.float32)
    steps = tl.div_rn(x.to(tl.float32), scale)
    steps = tl.minimum(tl.maximum(steps, -zero), 2**INPUT_BITS - 1 - zero)
    return ((steps + 12582912.0) - 12582912.0).to(tl.int32), zero.to(tl.int32)


@jit
def _weight_codes(
    codes_at,
    row,
    unit,
    out,
    row_bytes,
    PLACE: tl.constexpr,
    BITS: tl.constexpr,
    UNIT_BYTES: tl.constexpr,
):
    """Returns the codes in one place of units of weight rows, int32; see `formats.unpack`.

    Bytes outside the weight are read as zero.
    """
    SHIFT: tl.constexpr = PLACE * BITS % 8
    byte = unit * UNIT_BYTES + PLACE * BITS // 8
    at = codes_at + row * row_bytes + byte
    code = tl.load(at, mask=(row < out) & (byte < row_bytes), other=0).to(tl.int32) >> SHIFT
    if SHIFT + BITS > 8:
        rest = tl.load(at + 1, mask=(row < out) & (byte + 1 < row_bytes), other=0)
        code |= rest.to(tl.int32) << (8 - SHIFT)
    return code & (2**BITS - 1)


@jit
def _product(
    x_at,
    scale_at,
    zero_at,
    codes_at,
    weight_scale_at,
    weight_zero_at,
    bias_at,
    y_at,
    rows,
    width,
    out,
    row_bytes,
    group_size,
    groups,
    weight_scale_stride,
    scale_stride,
    TOKEN: tl.constexpr,
    FOLDS: tl.constexpr,
    CLUSTERS: tl.constexpr,
    BIAS: tl.constexpr,
    INPUT_BITS: tl.constexpr,
    BITS: tl.constexpr,
    PER_UNIT: tl.constexpr,
    UNIT_BYTES: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Computes a tile [BLOCK_ROWS, BLOCK_OUT] of y, one place of BLOCK_UNITS units at a time.

    A tile of one row keeps a sum for each unit and adds them up at the end.
    """
    ROW: tl.constexpr = BLOCK_ROWS == 1
    SUMS: tl.constexpr = BLOCK_UNITS if ROW else BLOCK_ROWS
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[None, :]
    sums = tl.zeros((SUMS, BLOCK_OUT), tl.float32)
    tiles = tl.cdiv(group_size, BLOCK_UNITS * PER_UNIT)
    for tile in range(groups * tiles):
        group = tile // tiles
        end = tl.minimum((group + 1) * group_size, width)
        unit = group * group_size // PER_UNIT + tile % tiles * BLOCK_UNITS
        unit += tl.arange(0, BLOCK_UNITS)
        at = column * weight_scale_stride + group
        weight_scale = tl.load(weight_scale_at + at, mask=column < out, other=0)
        weight_zero = tl.load(weight_zero_at + at, mask=column < out, other=0).to(tl.int32)
        if CLUSTERS:
            weight_scale *= tl.load(scale_at + group * group_size)
        total = tl.zeros((SUMS, BLOCK_OUT), tl.int32)
        for place in tl.static_range(PER_UNIT):
            channel = unit * PER_UNIT + place
            steps, zero = _input_steps(
                x_at,
                scale_at,
                zero_at,
                row,
                channel[:, None] if ROW else channel[None, :],
                rows,
                width,
                end,
                scale_stride,
                TOKEN,
                INPUT_BITS,
            )
            codes = _weight_codes(
                codes_at, column, unit[:, None], out, row_bytes, place, BITS, UNIT_BYTES
            )
            if ROW:
                total += steps * (codes - weight_zero)
            else:
                left, right = steps, codes - weight_zero
                if BITS == 8:
                    right = codes - 128
                    total += tl.sum(steps, 1)[:, None] * (128 - weight_zero)
                if INPUT_BITS == 8:
                    missing = 128 - zero
                    left = steps - missing
                    if TOKEN:
                        total += missing * tl.sum(right, 0)[None, :]
                    else:
                        total += tl.sum(tl.trans(missing) * right, 0)[None, :]
                total = tl.dot(left.to(tl.int8), right.to(tl.int8), total, out_dtype=tl.int32)
        sums += total.to(tl.float32) * weight_scale
    y = tl.sum(sums, 0)[None, :] if ROW else sums
    if TOKEN:
        y *= tl.load(scale_at + row, mask=row < rows, other=0)
    elif not FOLDS and not CLUSTERS:
        y *= tl.load(scale_at)
    if BIAS:
        y += tl.load(bias_at + column, mask=column < out, other=0)
    inside = (row < rows) & (column < out)
    tl.store(y_at + row * out + column, y.to(y_at.dtype.element_ty), mask=inside)


def _tuned(sizes: list[tuple[int, int, int]]) -> Any:
    """Returns `_product` with the fastest sizes, which are timed once per shape and bit widths.

    Args:
        sizes: Candidates (BLOCK_OUT, warps, stages). The interpreter takes the first, untimed.
    """
    if triton is None:
        return None
    kept = sizes[:1] if triton.knobs.runtime.interpret else sizes
    configs = [
        triton.Config({"BLOCK_OUT": block}, num_warps=warps, num_stages=stages)
        for block, warps, stages in kept
    ]
    key = ["width", "out", "group_size", "INPUT_BITS", "BITS", "BLOCK_ROWS"]
    return triton.autotune(configs, key)(_product)


_prefill = _tuned([(64, 4, 3), (32, 4, 4), (128, 4, 3), (128, 8, 3)])
_decode = _tuned([(16, 4, 3), (4, 2, 4), (8, 4, 4), (32, 8, 3)])

"""Products of packed layers on a GPU for whole chunks of 64 or 128 channels, in two launches.

The first launch quantizes the input, see `triton_inputs`. The second multiplies:

- `_few_rows` serves up to `DECODING_ROWS` rows. It reads codes as they are stored, in words of 32
  bits, and takes four products per `dp4a`. Each program serves one row. Programs of the same
  outputs run side by side, so the weight is fetched from memory once.
- `_many_rows` multiplies tiles on int8 tensor cores, transposed (y^T = W x^T). The unpacked weight
  is then the operand that tensor cores can read from registers.

In the notation of `base.py`, a chunk of channels lies in one weight group, and its sum is

    sum_k t_k v_k = sum_k q'_k w'_k + (c - z) sum_k t_k + sum_k (128 - z_k) w'_k

with w' = q - c of the weight (c = 128 at 8 bits, else 0). For an input of 8 bits, q' = q - 128.
For fewer bits, q' = t and the last sum is absent. All three sums are exact. The first is in int32,
the second comes from sums that the first launch writes, and the third from sums over the weight,
which are made once (`offsets`) and take 4 bytes for each chunk of an output. The sum of a chunk is
below 2^24, so float32 holds it.

An input that is not finite makes all outputs of its row NaN, because its sums of steps are NaN.
The check that raises an error on the host can therefore be left out while a CUDA graph is captured.

Layers that do not consist of such chunks are left to `triton_kernels.py`, NormalFloat weights to
`triton_normal_float.py`. Triton's interpreter emulates `dp4a` and the unpacking of four bytes at
once. All other code is what GPUs run.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qvlm.packing.kernels.triton_inputs import Grid, InputLayout
from qvlm.packing.kernels.triton_kernels import DECODING_ROWS, jit, tl, triton
from qvlm.packing.kernels.triton_launch import Tile, overlapping, tile, wait


@dataclass(frozen=True)
class UniformWeight:
    """A uniform weight as `multiply` reads it.

    Attributes:
        bits: Number of bits of the codes, 4 or 8.
        codes: Packed codes in the layout of checkpoints, [out, bytes] uint8.
        scale: Scales, [out or 1, groups] float32.
        zero_point: Zero points of the shape of `scale`, uint8.
        offset: Result of `offsets`, which inputs of 8 bits need.
    """

    bits: int
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    offset: Tensor | None


def offsets(codes: Tensor, bits: int, zero_point: Tensor | None, chunk: int) -> Tensor:
    """Returns what inputs of 8 bits add to the sums of chunks, [out, chunks] int32.

    Args:
        codes: Codes of the weight with channels as they are stored, [out, in] uint8.
        bits: Number of bits of the codes.
        zero_point: Zero point of a static input, [] or [in]. None, for zero points of tokens, gives
            the sums of w' alone.
        chunk: Number of channels of a chunk.
    """
    out, width = codes.shape
    found = torch.empty(out, width // chunk, dtype=torch.int32, device=codes.device)
    step = max(1, 2**24 // width)
    for first in range(0, out, step):
        shifted = codes[first : first + step].int() - (128 if bits == 8 else 0)
        if zero_point is not None:
            shifted *= 128 - zero_point.int()
        found[first : first + step] = shifted.unflatten(1, (-1, chunk)).sum(2)
    return found


def multiply(
    q: Tensor,
    sums: Tensor,
    grid: Grid,
    layout: InputLayout,
    weight: UniformWeight,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    folds: bool = False,
    clusters: bool = False,
    chosen: Tile | None = None,
) -> Tensor:
    """Multiplies a quantized input with a packed weight, transposed, and adds the bias.

    Args:
        q, sums: Results of `triton_inputs.quantize`.
        grid, layout: What the input was quantized with.
        weight: Weight.
        dtype: Type of the output.
        bias: Bias, [out] float32.
        folds: Whether the input's scale is folded into the weight.
        clusters: Whether scales [in] of the input are equal within each group of weights.
        chosen: Tile; None takes the one in `TILES`.

    Returns:
        Output, [rows, out] of `dtype`.
    """
    scale, zero_point = grid
    rows, width = len(q), q.shape[1] * q.shape[2]
    out, chunks = len(weight.codes), width // layout.chunk
    y = torch.empty(rows, out, dtype=dtype, device=q.device)
    if not y.numel():
        return y
    few = rows <= DECODING_ROWS
    chosen = chosen or tile("few" if few else "many", weight.bits, rows)
    groups = weight.scale.shape[1]
    common = (
        scale,
        zero_point,
        weight.scale,
        weight.zero_point,
        weight.offset,
        bias,
        y,
        rows,
        out,
        chunks,
        chunks // groups,
        groups if len(weight.scale) > 1 else 0,
    )
    options: dict[str, Any] = {
        "TOKEN": scale.ndim == 2,
        "FOLDS": folds,
        "CLUSTERS": clusters,
        "BIAS": bias is not None,
        "INPUT_BITS": layout.bits,
        "BITS": weight.bits,
        "CHUNK": layout.chunk,
        "BLOCK_OUT": chosen.outputs,
        "EMULATE": triton.knobs.runtime.interpret,
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
        **overlapping(q.device),
    }
    blocks = triton.cdiv(out, chosen.outputs)
    with torch.cuda.device_of(q):
        if few:
            words = q.view(torch.int32), weight.codes.view(torch.int32)
            _few_rows[(rows, blocks)](*words, sums, *common, BLOCK_CHUNKS=chosen.other, **options)
        else:
            _many_rows[(triton.cdiv(rows, chosen.other), blocks)](
                q, weight.codes, sums, *common, BLOCK_ROWS=chosen.other, **options
            )
    return y


@jit
def _dp4a(a, b, total, EMULATE: tl.constexpr):
    """Returns `total` plus the four products of signed bytes of the int32 words a and b."""
    if EMULATE:
        for byte in tl.static_range(4):
            total += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
        return total
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], tl.int32, True, 1
    )


@jit
def _halves(codes, EMULATE: tl.constexpr):
    """Returns the low and the high halves of bytes, int8."""
    if EMULATE:
        return (codes & 15).to(tl.int8), (codes >> 4).to(tl.int8)
    return tl.inline_asm_elementwise(
        "and.b32 $0, $2, 0x0F0F0F0F; shr.b32 $1, $2, 4; and.b32 $1, $1, 0x0F0F0F0F;",
        "=r,=r,r",
        [codes],
        (tl.int8, tl.int8),
        True,
        4,
    )


@jit
def _signed(codes, EMULATE: tl.constexpr):
    """Returns bytes less 128, int8."""
    if EMULATE:
        return (codes.to(tl.int32) - 128).to(tl.int8)
    return tl.inline_asm_elementwise(
        "xor.b32 $0, $1, 0x80808080;", "=r,r", [codes], tl.int8, True, 4
    )


@jit
def _few_rows(
    q_at,
    codes_at,
    sums_at,
    scale_at,
    zero_at,
    weight_scale_at,
    weight_zero_at,
    offset_at,
    bias_at,
    y_at,
    rows,
    out,
    chunks,
    chunks_per_group,
    weight_scale_stride,
    TOKEN: tl.constexpr,
    FOLDS: tl.constexpr,
    CLUSTERS: tl.constexpr,
    BIAS: tl.constexpr,
    INPUT_BITS: tl.constexpr,
    BITS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    EMULATE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Writes BLOCK_OUT outputs of a row. Words of q' and codes are [outputs, chunks, words]."""
    WORDS: tl.constexpr = CHUNK * BITS // 32
    CENTER: tl.constexpr = 128 if BITS == 8 else 0
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = column < out
    row_words = chunks * WORDS
    code_row = codes_at + column.to(tl.int64)[:, None, None] * row_words
    group_row = column[:, None] * weight_scale_stride
    q_row = q_at + row.to(tl.int64) * (chunks * (CHUNK // 4))
    total = tl.zeros((BLOCK_OUT, BLOCK_CHUNKS), tl.float32)
    chunk = tl.arange(0, BLOCK_CHUNKS)
    word = chunk[None, :, None] * WORDS + tl.arange(0, WORDS)[None, None, :]
    # The weight is fetched a tile ahead of its product.
    both = (word < row_words) & inside[:, None, None]
    mask = inside[:, None] & (chunk < chunks)[None, :]
    at = group_row + (chunk // chunks_per_group)[None, :]
    next_codes = tl.load(code_row + word, mask=both, other=0)
    next_scale = tl.load(weight_scale_at + at, mask=mask, other=0)
    next_zero = tl.load(weight_zero_at + at, mask=mask, other=0)
    wait(OVERLAP)
    for first in range(0, chunks, BLOCK_CHUNKS):
        codes, weight_scale, weight_zero = next_codes, next_scale, next_zero
        chunk = first + tl.arange(0, BLOCK_CHUNKS)
        word = chunk[None, :, None] * WORDS + tl.arange(0, WORDS)[None, None, :]
        there, within = chunk < chunks, word < row_words
        mask = inside[:, None] & there[None, :]
        following = chunk + BLOCK_CHUNKS
        next_word = word + BLOCK_CHUNKS * WORDS
        next_both = (next_word < row_words) & inside[:, None, None]
        next_mask = inside[:, None] & (following < chunks)[None, :]
        at = group_row + (following // chunks_per_group)[None, :]
        next_codes = tl.load(code_row + next_word, mask=next_both, other=0)
        next_scale = tl.load(weight_scale_at + at, mask=next_mask, other=0)
        next_zero = tl.load(weight_zero_at + at, mask=next_mask, other=0)
        sums = tl.load(sums_at + chunk * rows + row, mask=there, other=0)
        q = tl.load(q_row + word, mask=within, other=0)
        none = tl.zeros((BLOCK_OUT, BLOCK_CHUNKS, WORDS), tl.int32)
        if BITS == 4:
            high_q = tl.load(q_row + row_words + word, mask=within, other=0)
            products = _dp4a(codes & 0x0F0F0F0F, q + none, none, EMULATE)
            products = _dp4a((codes >> 4) & 0x0F0F0F0F, high_q + none, products, EMULATE)
        else:
            # Beyond the weight q is zero, so these words do not matter.
            products = _dp4a(codes ^ -2139062144, q + none, none, EMULATE)
        exact = tl.sum(products, 2)
        if CLUSTERS:
            weight_scale *= tl.load(scale_at + chunk * CHUNK, mask=there, other=0)[None, :]
        if INPUT_BITS == 8:
            offset = tl.load(offset_at + column[:, None] * chunks + chunk[None, :], mask, 0)
            if TOKEN:
                offset *= 128 - tl.load(zero_at + row).to(tl.int32)
            exact += offset
        center = CENTER - weight_zero.to(tl.float32)
        total += (exact.to(tl.float32) + center * sums[None, :]) * weight_scale
    y = tl.sum(total, 1)
    if TOKEN:
        y *= tl.load(scale_at + row)
    elif not FOLDS and not CLUSTERS:
        y *= tl.load(scale_at)
    if BIAS:
        y += tl.load(bias_at + column, mask=inside, other=0)
    at = y_at + row.to(tl.int64) * out + column
    tl.store(at, y.to(y_at.dtype.element_ty), mask=inside)


@jit
def _many_rows(
    q_at,
    codes_at,
    sums_at,
    scale_at,
    zero_at,
    weight_scale_at,
    weight_zero_at,
    offset_at,
    bias_at,
    y_at,
    rows,
    out,
    chunks,
    chunks_per_group,
    weight_scale_stride,
    TOKEN: tl.constexpr,
    FOLDS: tl.constexpr,
    CLUSTERS: tl.constexpr,
    BIAS: tl.constexpr,
    INPUT_BITS: tl.constexpr,
    BITS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    EMULATE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Writes a tile [BLOCK_OUT, BLOCK_ROWS] of y^T, which it sums chunk by chunk.

    A sum starts at the bits of 1.5 * 2^23. Read as float32, its bits are then that number plus the
    integer, which is below 2^22.
    """
    BYTES: tl.constexpr = CHUNK * BITS // 8
    CENTER: tl.constexpr = 128 if BITS == 8 else 0
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside, present = column < out, row < rows
    byte = tl.arange(0, BYTES)
    code_at = codes_at + column.to(tl.int64)[:, None] * (chunks * BYTES) + byte[None, :]
    at_q = q_at + row.to(tl.int64)[None, :] * (chunks * CHUNK) + byte[:, None]
    plane = chunks * BYTES
    total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    wait(OVERLAP)
    for chunk in range(chunks):
        codes = tl.load(code_at + chunk * BYTES, mask=inside[:, None], other=0)
        q = tl.load(at_q + chunk * BYTES, mask=present[None, :], other=0)
        products = tl.full((BLOCK_OUT, BLOCK_ROWS), 0x4B400000, tl.int32)
        if BITS == 4:
            high_q = tl.load(at_q + plane + chunk * BYTES, mask=present[None, :], other=0)
            low, high = _halves(codes, EMULATE)
            products = tl.dot(low, q, products, out_dtype=tl.int32)
            products = tl.dot(high, high_q, products, out_dtype=tl.int32)
        else:
            products = tl.dot(_signed(codes, EMULATE), q, products, out_dtype=tl.int32)
        at = column * weight_scale_stride + chunk // chunks_per_group
        weight_scale = tl.load(weight_scale_at + at, mask=inside, other=0)
        weight_zero = tl.load(weight_zero_at + at, mask=inside, other=0).to(tl.float32)
        sums = tl.load(sums_at + chunk * rows + row, mask=present, other=0)
        if CLUSTERS:
            weight_scale *= tl.load(scale_at + chunk * CHUNK)
        exact = products.to(tl.float32, bitcast=True) - 12582912.0
        if INPUT_BITS == 8:
            offset = tl.load(offset_at + column * chunks + chunk, mask=inside, other=0)
            offset = offset.to(tl.float32)
            if TOKEN:
                missing = 128 - tl.load(zero_at + row, mask=present, other=0)
                exact += offset[:, None] * missing[None, :]
            else:
                exact += offset[:, None]
        exact += (CENTER - weight_zero)[:, None] * sums[None, :]
        total += exact * weight_scale[:, None]
    if TOKEN:
        total *= tl.load(scale_at + row, mask=present, other=0)[None, :]
    elif not FOLDS and not CLUSTERS:
        total *= tl.load(scale_at)
    if BIAS:
        total += tl.load(bias_at + column, mask=inside, other=0)[:, None]
    y = tl.trans(total).to(y_at.dtype.element_ty)
    at = y_at + row.to(tl.int64)[:, None] * out + column[None, :]
    tl.store(at, y, mask=present[:, None] & inside[None, :])

"""Products of packed layers on a GPU for whole chunks of 64 or 128 channels, in two launches.

The first launch (`_quantize`) quantizes an input once, in the order of the stored channels, and
writes its integers in planes: a unit of two INT4 codes is a byte, so plane 0 holds the channels of
all low halves and plane 1 those of all high halves. The codes of a word then multiply neighbors in
each plane, and no code has to be moved. The second launch multiplies:

- `_few_rows`, up to `DECODING_ROWS` rows: 32-bit words of codes as they are stored, four products
  per `dp4a`. One row per program; programs of the same outputs run side by side.
- `_many_rows`: tiles on int8 tensor cores, transposed (y^T = W x^T), so that the unpacked weight is
  the operand that tensor cores can read from registers.

In the notation of `kernels.py`, a chunk of channels lies in one weight group, and its sum is

    sum_k t_k v_k = sum_k q'_k w'_k + (c - z) sum_k t_k + sum_k (128 - z_k) w'_k

with w' = q - c of the weight (c = 128 at 8 bits, else 0), and q' = q - 128 of an input of 8 bits,
else q' = t and the last sum is absent. All three are exact: the first in int32, the second from the
sums that `_quantize` writes, the third from sums over the weight that are made once (`offsets`;
4 bytes for each chunk of an output). A chunk is below 2^24, so float32 holds it.

An input that is not finite makes all outputs of its row NaN, by way of those sums. So the check
that raises an error on a host may be left out where a CUDA graph is captured.

NormalFloat of 4 bits: `_float_few` looks levels up and multiplies them by x_hat, then by their
block's constant, in float32. For more rows `_float_weight` makes the weight of the one layer in
bf16, and the stock product multiplies it: looked up again for every tile of rows, levels took ten
times as long on an H100.

What does not come in chunks is left to `triton_kernels.py`. Under Triton's interpreter, `dp4a` and
the unpacking of four bytes at once are emulated; everything else is the code that GPUs run.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qvlm.packing.triton_kernels import DECODING_ROWS, _jit, tl, triton

CHUNKS = (128, 64)
# What an input of `quantize` is made of: see there.
PLAIN, GATED, NORMED = 0, 1, 2
# Whether a launch may begin before the one before it has ended (programmatic dependent launch):
# it then fetches weights until that one's output is there.
OVERLAP = True


@dataclass(frozen=True)
class Tile:
    """Sizes of one program of a product.

    Attributes:
        outputs: Outputs of a tile.
        other: Chunks that are loaded together (few rows), or rows of a tile (many rows).
        warps: Warps of 32 threads.
        stages: Depth of the software pipeline.
    """

    outputs: int
    other: int
    warps: int
    stages: int


# Chosen by `make gpu` on the card that results/gpu.md names; key: product, bits, rows at most.
TILES: dict[tuple[str, int, int], Tile] = {
    ("few", 4, 4): Tile(2, 16, 1, 1),
    ("few", 8, 4): Tile(2, 8, 2, 1),
    ("many", 4, 16): Tile(32, 16, 4, 4),
    ("many", 8, 16): Tile(32, 16, 2, 6),
    ("many", 4, 2**31): Tile(128, 64, 4, 3),
    ("many", 8, 2**31): Tile(64, 128, 4, 4),
    ("float_few", 4, 4): Tile(2, 8, 1, 1),
}


def tile(product: str, bits: int, rows: int) -> Tile:
    """The tile that serves a product of so many rows."""
    return next(
        chosen
        for (name, width, most), chosen in TILES.items()
        if (name, width) == (product, bits) and rows <= most
    )


def overlapping(device: torch.device) -> dict[str, Any]:
    """Options of a launch on a device: whether it overlaps with the one before."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"OVERLAP": True, "launch_pdl": True} if able and OVERLAP else {"OVERLAP": False}


def chunk(bits: int, group_size: int, width: int) -> int | None:
    """Channels of a chunk for groups of this size, or None if these products do not serve them."""
    if bits not in (4, 8) or width % group_size:
        return None
    return next((size for size in CHUNKS if group_size % size == 0), None)


def token_grid(x: Tensor, bits: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row of x [rows, in], [rows, 1] float32.

    The same numbers as those of `affine_grid` for the row's extremes times `ratio`.
    """
    rows, width = x.shape
    scale, zero_point = torch.empty(2, rows, 1, device=x.device)
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        _token_grid[(rows,)](x, scale, zero_point, width, ratio, BITS=bits, BLOCK=block)
    return scale, zero_point


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    planes: int,
    chunk: int,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The integers of an input in planes, and their sums.

    Args:
        x: [rows, in], float.
        scale, zero_point: [] or [in], as stored, or [rows, 1] if per token; float32, a static zero
            point of any type.
        bits: of the input.
        planes: 2 for weights of 4 bits, 1 for 8.
        chunk: Channels of a chunk.
        order: [in] int32, the channels in the order of the codes; None if that is their own.

    Returns:
        q' [rows, planes, in / planes] int8, and sums of t over each chunk, [chunks, rows] float32,
        NaN where the chunk holds NaN or infinity.
    """
    rows, width = x.shape
    q = torch.empty(rows, planes, width // planes, dtype=torch.int8, device=x.device)
    sums = torch.empty(width // chunk, rows, device=x.device)
    _launch_quantize(x, scale, zero_point, bits, chunk, order, q, sums, planes, False)
    return q, sums


def quantize_gated(
    gate: Tensor,
    up: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    planes: int,
    chunk: int,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`quantize` of silu(gate) * up, [rows, in] each, whose rows may lie apart."""
    rows, width = gate.shape
    q = torch.empty(rows, planes, width // planes, dtype=torch.int8, device=gate.device)
    sums = torch.empty(width // chunk, rows, device=gate.device)
    _launch_quantize(
        gate, scale, zero_point, bits, chunk, order, q, sums, planes, False, source=GATED, other=up
    )
    return q, sums


def quantize_normed(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    epsilon: float,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    planes: int,
    chunk: int,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x + delta, and `quantize` of its RMS norm."""
    rows, width = x.shape
    q = torch.empty(rows, planes, width // planes, dtype=torch.int8, device=x.device)
    sums = torch.empty(width // chunk, rows, device=x.device)
    added = x if delta is None else torch.empty_like(x)
    _launch_quantize(
        x,
        scale,
        zero_point,
        bits,
        chunk,
        order,
        q,
        sums,
        planes,
        False,
        source=NORMED,
        other=delta,
        norm=(weight, added, epsilon),
    )
    return added, q, sums


def _launch_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    chunk: int,
    order: Tensor | None,
    q: Tensor,
    sums: Tensor,
    planes: int,
    folds: bool,
    source: int = PLAIN,
    other: Tensor | None = None,
    norm: tuple[Tensor | None, Tensor | None, float] = (None, None, 0.0),
) -> None:
    rows, width = x.shape
    chunks = width // chunk
    block = 4 if rows <= 16 else 16
    weight, added, epsilon = norm
    with torch.cuda.device_of(x):
        _quantize[(rows, triton.cdiv(chunks, block))](
            x,
            order,
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
            ORDERED=order is not None,
            FOLDS=folds,
            INPUT_BITS=bits,
            PLANES=planes,
            CHUNK=chunk,
            BLOCK=block,
            SOURCE=source,
            ADD=source == NORMED and other is not None,
            WHOLE=triton.next_power_of_2(width) if source == NORMED else 1,
            num_warps=8 if source == NORMED else 4,
            **overlapping(x.device),
        )


def offsets(codes: Tensor, bits: int, zero_point: Tensor | None, chunk: int) -> Tensor:
    """What inputs of 8 bits add to the sums of chunks, [out, chunks] int32.

    Args:
        codes: [out, in] uint8, as stored.
        zero_point: of a static input, [] or [in]; None, if it is per token, gives sums of w'
            itself.
    """
    out, width = codes.shape
    found = torch.empty(out, width // chunk, dtype=torch.int32, device=codes.device)
    for rows in torch.arange(out).split(max(1, 2**24 // width)):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        shifted = codes[part].int() - (128 if bits == 8 else 0)
        if zero_point is not None:
            shifted *= 128 - zero_point.int()
        found[part] = shifted.unflatten(1, (-1, chunk)).sum(2)
    return found


def multiply(
    q: Tensor,
    sums: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    input_bits: int,
    codes: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    weight_bits: int,
    chunk: int,
    dtype: torch.dtype,
    folds: bool = False,
    clusters: bool = False,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
    chosen: Tile | None = None,
) -> Tensor:
    """A quantized input times a packed weight, transposed, plus bias: [rows, out].

    Args:
        q, sums: of `quantize`.
        scale, zero_point: of the input, as there.
        codes: [out, bytes] uint8, as `formats` says.
        weight_scale, weight_zero_point: [out or 1, groups], float32 and uint8.
        dtype: of the output.
        folds: the output is not multiplied by `scale`.
        clusters: scales [in] are equal within each group of weights.
        bias: [out] float32.
        offset: of `offsets`, needed for inputs of 8 bits.
        chosen: The tile; by default the one of `TILES`.
    """
    rows, width = len(q), q[0].numel()
    out, chunks = len(codes), width // chunk
    y = torch.empty(rows, out, dtype=dtype, device=q.device)
    if not y.numel():
        return y
    few = rows <= DECODING_ROWS
    chosen = chosen or tile("few" if few else "many", weight_bits, rows)
    groups = weight_scale.shape[1]
    common = (
        scale,
        zero_point,
        weight_scale,
        weight_zero_point,
        offset,
        bias,
        y,
        rows,
        out,
        chunks,
        chunks // groups,
        groups if len(weight_scale) > 1 else 0,
    )
    options: dict[str, Any] = {
        "TOKEN": scale.ndim == 2,
        "FOLDS": folds,
        "CLUSTERS": clusters,
        "BIAS": bias is not None,
        "INPUT_BITS": input_bits,
        "BITS": weight_bits,
        "CHUNK": chunk,
        "BLOCK_OUT": chosen.outputs,
        "EMULATE": triton.knobs.runtime.interpret,
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
        **overlapping(q.device),
    }
    with torch.cuda.device_of(q):
        if few:
            _few_rows[(rows, triton.cdiv(out, chosen.outputs))](
                q.view(torch.int32), codes.view(torch.int32), sums, *common,
                BLOCK_CHUNKS=chosen.other, **options,
            )  # fmt: skip
        else:
            blocks = triton.cdiv(rows, chosen.other), triton.cdiv(out, chosen.outputs)
            _many_rows[blocks](q, codes, sums, *common, BLOCK_ROWS=chosen.other, **options)
    return y


def float_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    input_bits: int,
    folds: bool,
    codes: Tensor,
    levels: Tensor,
    constant_codes: Tensor | None,
    largest: Tensor,
    mean: Tensor,
    constant_levels: Tensor | None,
    constant_block_size: int,
    block_size: int,
    bias: Tensor | None = None,
    chosen: Tile | None = None,
) -> Tensor:
    """An input times a NormalFloat weight of 4 bits, transposed, plus bias, in dtype of `x`.

    Args:
        levels: [16] float32.
        constant_codes, largest, mean, constant_block_size: of `formats.Constants`.
        constant_levels: [256] float32; None if the constants are not coded.
        block_size: Weights that share a constant, 64 or 128.
    """
    (rows, width), out = x.shape, len(codes)
    if not rows:
        return torch.empty(rows, out, dtype=x.dtype, device=x.device)
    few = rows <= DECODING_ROWS
    kind = torch.float32 if few else torch.bfloat16
    planes = 2 if few else 1
    x_hat = torch.empty(rows, planes, width // planes, dtype=kind, device=x.device)
    _launch_quantize(
        x, scale, zero_point, input_bits, block_size, None, x_hat, x_hat, planes, folds
    )
    common = (
        levels,
        constant_codes,
        largest,
        mean,
        constant_levels,
        out,
        width // block_size,
        constant_block_size,
    )
    coded = constant_levels is not None
    if not few:
        made = torch.empty(out, width, dtype=torch.bfloat16, device=x.device)
        with torch.cuda.device_of(x):
            _float_weight[(triton.cdiv(out, 8), width // block_size)](
                codes, made, *common, CODED=coded, CHUNK=block_size, BLOCK_OUT=8
            )
        product = x_hat[:, 0] @ made.T
        return (product if bias is None else product + bias).to(x.dtype)
    chosen = chosen or tile("float_few", 4, rows)
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _float_few[(rows, triton.cdiv(out, chosen.outputs))](
            x_hat,
            codes.view(torch.int32),
            bias,
            y,
            *common,
            CODED=coded,
            BIAS=bias is not None,
            CHUNK=block_size,
            BLOCK_OUT=chosen.outputs,
            BLOCK_CHUNKS=chosen.other,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
        )
    return y


@_jit
def _grid_of(lo, hi, BITS: tl.constexpr):
    """`affine_grid` of ranges that hold zero."""
    LEVELS: tl.constexpr = 2**BITS - 1
    levels = tl.full([], LEVELS, tl.float32)
    scale = tl.div_rn(hi, levels) - tl.div_rn(lo, levels)
    scale = tl.maximum(scale, 1.1754943508222875e-38)
    zero = (tl.minimum(tl.maximum(tl.div_rn(-lo, scale), 0.0), LEVELS) + 12582912.0) - 12582912.0
    longest = tl.maximum(zero, LEVELS - zero)
    return tl.minimum(
        scale, tl.div_rn(tl.full([], 3.402820018375656e38, tl.float32), longest)
    ), zero


@_jit
def _token_grid(x_at, scale_at, zero_at, width, ratio, BITS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    x = tl.load(x_at + row * width + channel, mask=channel < width, other=0).to(tl.float32)
    lo, hi = tl.min(x, 0) * ratio, tl.max(x, 0) * ratio
    scale, zero = _grid_of(lo, hi, BITS)
    tl.store(scale_at + row, scale)
    tl.store(zero_at + row, zero)


@_jit
def _wait(OVERLAP: tl.constexpr):
    """Lets the next launch begin, and waits for the output of the one before."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@_jit
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
    """Chunks of a row: q' and sums of t; or, where `q_at` is of floats, x_hat.

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
    # What the launch before did not write is there already.
    source = channel
    if ORDERED:
        source = tl.load(order_at + channel, mask=inside, other=0)
    if not TOKEN:
        scale = tl.load(scale_at + channel * scale_stride, mask=inside, other=1)
        zero = tl.load(zero_at + channel * scale_stride, mask=inside, other=0).to(tl.float32)
    if SOURCE == 2:
        weight = tl.load(weight_at + source, mask=inside, other=0)
    _wait(OVERLAP)
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


@_jit
def _dp4a(a, b, total, EMULATE: tl.constexpr):
    """`total` plus the four products of signed bytes of the int32 words a and b."""
    if EMULATE:
        for byte in tl.static_range(4):
            total += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
        return total
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], tl.int32, True, 1
    )


@_jit
def _halves(codes, EMULATE: tl.constexpr):
    """The low and the high halves of bytes, int8."""
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


@_jit
def _signed(codes, EMULATE: tl.constexpr):
    """Bytes less 128, int8."""
    if EMULATE:
        return (codes.to(tl.int32) - 128).to(tl.int8)
    return tl.inline_asm_elementwise(
        "xor.b32 $0, $1, 0x80808080;", "=r,r", [codes], tl.int8, True, 4
    )


@_jit
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
    """BLOCK_OUT outputs of a row; words of q' and codes, [outputs, chunks, words]."""
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
    _wait(OVERLAP)
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
            # Words beyond the weight are zero in q, so that it does not matter what they become.
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


@_jit
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
    """A tile [BLOCK_OUT, BLOCK_ROWS] of y^T, a chunk at a time.

    The sum starts at 1.5 * 2^23, whose bits as float32 then hold the integer (below 2^22).
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
    _wait(OVERLAP)
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


@_jit
def _constants(block, mask, codes_at, largest_at, mean_at, levels_at, size, CODED: tl.constexpr):
    """The constants of NormalFloat blocks; see `formats.decode_constants`."""
    if not CODED:
        return tl.load(largest_at + block, mask=mask, other=0)
    code = tl.load(codes_at + block, mask=mask, other=0).to(tl.int32)
    largest = tl.load(largest_at + block // size, mask=mask, other=0)
    return tl.load(levels_at + code) * largest + tl.load(mean_at)


@_jit
def _float_few(
    x_at,
    codes_at,
    bias_at,
    y_at,
    levels_at,
    constant_codes_at,
    largest_at,
    mean_at,
    constant_levels_at,
    out,
    chunks,
    size,
    CODED: tl.constexpr,
    BIAS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """BLOCK_OUT outputs of a row, in float32; words of 8 codes, [outputs, chunks, words]."""
    WORDS: tl.constexpr = CHUNK // 8
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = column < out
    row_words = chunks * WORDS
    code_row = codes_at + column.to(tl.int64)[:, None, None] * row_words
    x_row = x_at + row.to(tl.int64) * (chunks * CHUNK)
    total = tl.zeros((BLOCK_OUT, BLOCK_CHUNKS), tl.float32)
    places = tl.arange(0, BLOCK_CHUNKS)[None, :, None] * WORDS
    places += tl.arange(0, WORDS)[None, None, :]
    both = (places < row_words) & inside[:, None, None]
    next_codes = tl.load(code_row + places, mask=both, other=0)
    for first in range(0, chunks, BLOCK_CHUNKS):
        codes = next_codes
        chunk = first + tl.arange(0, BLOCK_CHUNKS)
        word = first * WORDS + places
        within = word < row_words
        next_word = word + BLOCK_CHUNKS * WORDS
        both = (next_word < row_words) & inside[:, None, None]
        next_codes = tl.load(code_row + next_word, mask=both, other=0)
        mask = inside[:, None] & (chunk < chunks)[None, :]
        block = column.to(tl.int64)[:, None] * chunks + chunk[None, :]
        constant = _constants(
            block, mask, constant_codes_at, largest_at, mean_at, constant_levels_at, size, CODED
        )
        products = tl.zeros((BLOCK_OUT, BLOCK_CHUNKS, WORDS), tl.float32)
        for place in tl.static_range(8):
            level = tl.load(levels_at + ((codes >> (4 * place)) & 15))
            unit = word * 4 + place // 2 + place % 2 * (chunks * (CHUNK // 2))
            products += level * tl.load(x_row + unit, mask=within, other=0)
        total += tl.sum(products, 2) * constant
    y = tl.sum(total, 1)
    if BIAS:
        y += tl.load(bias_at + column, mask=inside, other=0)
    at = y_at + row.to(tl.int64) * out + column
    tl.store(at, y.to(y_at.dtype.element_ty), mask=inside)


@_jit
def _float_weight(
    codes_at,
    weight_at,
    levels_at,
    constant_codes_at,
    largest_at,
    mean_at,
    constant_levels_at,
    out,
    chunks,
    size,
    CODED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """A block of BLOCK_OUT rows of the weight."""
    row = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    chunk = tl.program_id(1)
    inside = row < out
    channel = chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
    at = row.to(tl.int64)[:, None] * (chunks * CHUNK) + channel
    codes = tl.load(codes_at + at // 2, mask=inside[:, None], other=0).to(tl.int32)
    codes = (codes >> (channel % 2 * 4)) & 15
    constant = _constants(
        row.to(tl.int64) * chunks + chunk,
        inside,
        constant_codes_at,
        largest_at,
        mean_at,
        constant_levels_at,
        size,
        CODED,
    )
    weight = tl.load(levels_at + codes) * constant[:, None]
    tl.store(weight_at + at, weight.to(weight_at.dtype.element_ty), mask=inside[:, None])

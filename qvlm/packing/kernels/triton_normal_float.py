"""Products with NormalFloat weights of 4 bits on a GPU.

For few rows, `_few_rows` looks up the values of codes and multiplies them with x_hat in float32,
and each block's sum with its absmax. For more rows, `_dequantize` makes the weight of the one layer
in bf16, and the stock product multiplies it. A product of its own, which looked values up again for
every tile of rows, took ten times as long on an H100.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qvlm.packing.kernels.triton_inputs import Grid, InputLayout, dequantized
from qvlm.packing.kernels.triton_kernels import DECODING_ROWS, jit, tl, triton
from qvlm.packing.kernels.triton_launch import tile


@dataclass(frozen=True)
class NormalFloatWeight:
    """A NormalFloat weight of 4 bits, with its absmax as `absmax.PackedAbsmax` holds it.

    Attributes:
        codes: Packed codes in the layout of checkpoints, [out, in / 2] uint8.
        levels: Values of the codes, [16] float32.
        block_size: Number of weights that share an absmax, 64 or 128.
        absmax_codes: Codes of the absmax values, [blocks] uint8; None if these are in float32.
        absmax_levels: Values of absmax codes, [256] float32.
        nested: Nested absmax values or, without codes, the absmax values themselves, float32.
        mean: Mean of the absmax values, [1] float32.
        nested_block_size: Number of codes that share a nested absmax.
    """

    codes: Tensor
    levels: Tensor
    block_size: int
    absmax_codes: Tensor | None
    absmax_levels: Tensor
    nested: Tensor
    mean: Tensor
    nested_block_size: int


def linear(
    x: Tensor, grid: Grid, bits: int, folds: bool, weight: NormalFloatWeight, bias: Tensor | None
) -> Tensor:
    """Multiplies an input with a NormalFloat weight, transposed, and adds the bias.

    Args:
        x: Input with at least one row, [rows, in].
        grid: Scale and zero point of the input.
        bits: Number of bits of the input.
        folds: Whether the input's scale is folded into the weight.
        weight: Weight.
        bias: Bias, [out] float32.

    Returns:
        Output in the dtype of `x`, [rows, out].
    """
    (rows, width), out = x.shape, len(weight.codes)
    few = rows <= DECODING_ROWS
    layout = InputLayout(bits, 2 if few else 1, weight.block_size, None)
    x_hat = dequantized(x, grid, layout, folds, torch.float32 if few else torch.bfloat16)
    chunks = width // weight.block_size
    absmax = (
        weight.levels,
        weight.absmax_codes,
        weight.nested,
        weight.mean,
        weight.absmax_levels,
        out,
        chunks,
        weight.nested_block_size,
    )
    coded = weight.absmax_codes is not None
    if not few:
        made = torch.empty(out, width, dtype=torch.bfloat16, device=x.device)
        with torch.cuda.device_of(x):
            _dequantize[(triton.cdiv(out, 8), chunks)](
                weight.codes, made, *absmax, CODED=coded, CHUNK=weight.block_size, BLOCK_OUT=8
            )
        product = x_hat[:, 0] @ made.T
        return (product if bias is None else product + bias).to(x.dtype)
    chosen = tile("float_few", 4, rows)
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _few_rows[(rows, triton.cdiv(out, chosen.outputs))](
            x_hat,
            weight.codes.view(torch.int32),
            bias,
            y,
            *absmax,
            CODED=coded,
            BIAS=bias is not None,
            CHUNK=weight.block_size,
            BLOCK_OUT=chosen.outputs,
            BLOCK_CHUNKS=chosen.other,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
        )
    return y


@jit
def _absmax(block, mask, codes_at, nested_at, mean_at, levels_at, size, CODED: tl.constexpr):
    """Returns the absmax of each block, see `absmax.dequantize_absmax`."""
    if not CODED:
        return tl.load(nested_at + block, mask=mask, other=0)
    code = tl.load(codes_at + block, mask=mask, other=0).to(tl.int32)
    nested = tl.load(nested_at + block // size, mask=mask, other=0)
    return tl.load(levels_at + code) * nested + tl.load(mean_at)


@jit
def _few_rows(
    x_at,
    codes_at,
    bias_at,
    y_at,
    levels_at,
    absmax_codes_at,
    nested_at,
    mean_at,
    absmax_levels_at,
    out,
    chunks,
    size,
    CODED: tl.constexpr,
    BIAS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """Writes BLOCK_OUT outputs of a row. Words of 8 codes are [outputs, chunks, words]."""
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
        absmax = _absmax(
            block, mask, absmax_codes_at, nested_at, mean_at, absmax_levels_at, size, CODED
        )
        products = tl.zeros((BLOCK_OUT, BLOCK_CHUNKS, WORDS), tl.float32)
        for place in tl.static_range(8):
            level = tl.load(levels_at + ((codes >> (4 * place)) & 15))
            unit = word * 4 + place // 2 + place % 2 * (chunks * (CHUNK // 2))
            products += level * tl.load(x_row + unit, mask=within, other=0)
        total += tl.sum(products, 2) * absmax
    y = tl.sum(total, 1)
    if BIAS:
        y += tl.load(bias_at + column, mask=inside, other=0)
    at = y_at + row.to(tl.int64) * out + column
    tl.store(at, y.to(y_at.dtype.element_ty), mask=inside)


@jit
def _dequantize(
    codes_at,
    weight_at,
    levels_at,
    absmax_codes_at,
    nested_at,
    mean_at,
    absmax_levels_at,
    out,
    chunks,
    size,
    CODED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Writes a chunk of BLOCK_OUT rows of the weight."""
    row = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    chunk = tl.program_id(1)
    inside = row < out
    channel = chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
    at = row.to(tl.int64)[:, None] * (chunks * CHUNK) + channel
    codes = tl.load(codes_at + at // 2, mask=inside[:, None], other=0).to(tl.int32)
    codes = (codes >> (channel % 2 * 4)) & 15
    absmax = _absmax(
        row.to(tl.int64) * chunks + chunk,
        inside,
        absmax_codes_at,
        nested_at,
        mean_at,
        absmax_levels_at,
        size,
        CODED,
    )
    weight = tl.load(levels_at + codes) * absmax[:, None]
    tl.store(weight_at + at, weight.to(weight_at.dtype.element_ty), mask=inside[:, None])

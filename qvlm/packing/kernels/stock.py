"""Products of packed layers by stock PyTorch operators, and when each of them serves.

With steps t = q - z of an input and v = q - z of a weight, a layer is

    y = sum_k (t_k c_k) (v_k s_k) d + b

where d is the scale of the token (or 1), c that of the channel (or 1), s that of the weight group.

`reference` unpacks the weight to float32, some rows at a time, and multiplies. Serves everything.
`bf16` rounds both operands first, as a model in bf16 does with its own.

`int_mm` multiplies int8 by int8 into int32. Channels that share c and s form a cell; what is
summed within a cell is exact, and each cell is scaled and added in float32, or in float64 for a
model in float32. Steps of up to 7 bits are in -127 .. 127. At 8 bits the operands are q - 128
instead, and the difference is made good by exact sums, which come out of the same product as two
further rows.

`int4_weight_only` multiplies a bf16 input with 4-bit weights as they are stored. Its weight is
(q - 8) s, with s rounded to bf16; the rest, (8 - z) s times the sum of the group's inputs, is added
in float32. Inputs are the steps, which bf16 holds exactly, unless channels have different scales.
Its layout is found out by packing a known weight, and where that fails it does not serve.

Products of our own, which leave less speed on the table: `native.py` for CPUs, `triton_kernels.py`
for GPUs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

INT4_GROUPS = (256, 128, 64, 32)
INT4_ROWS = 16
_INT4_BLOCK = 64
# More elements of an int32 sum of products of up to 255 * 255 could overflow.
INT_MM_WIDTH = (2**31 - 1) // 255**2
# Float weights that the reference makes at a time: bounds its memory to a few times this.
PIECE = 2**22


@dataclass(frozen=True)
class Cell:
    """Channels that share all scales.

    Attributes:
        channels: a run of them, or their indices [n].
        width: how many.
        group: the weight's scale.
        channel: one of them, for its input scale.
    """

    channels: slice | Tensor
    width: int
    group: int
    channel: int


def find_cells(width: int, group_size: int, channel_scale: Tensor | None) -> list[Cell]:
    """The cells of `width` channels, whose weights share scales in runs of `group_size`.

    Args:
        channel_scale: of each input channel, [width], or None if they all share one.
    """
    if channel_scale is None:
        return [
            Cell(slice(at, min(at + group_size, width)), min(group_size, width - at), group, at)
            for group, at in enumerate(range(0, width, group_size))
        ]
    cluster = channel_scale.unique(return_inverse=True)[1]
    group = torch.arange(width, device=cluster.device) // group_size
    key = cluster * (int(group.max()) + 1) + group
    order = torch.argsort(key, stable=True)
    sizes = key[order].unique_consecutive(return_counts=True)[1].tolist()
    return [
        Cell(channels, len(channels), int(group[channels[0]]), int(channels[0]))
        for channels in order.split(sizes)
    ]


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, group_size: int) -> Tensor:
    """The weight [out, in] float32 of codes [out, in]; scale and zero point are [out, groups]."""
    width = codes.shape[1]
    groups = F.pad(codes, (0, -width % group_size)).unflatten(1, (-1, group_size))
    values = (groups - zero_point[..., None]).mul_(scale[..., None])
    return values.flatten(1)[:, :width]


def pieces(rows: int, width: int) -> list[slice]:
    """Runs of weight rows that are made float together."""
    step = max(1, PIECE // width)
    return [slice(top, min(top + step, rows)) for top in range(0, rows, step)]


def int_products(
    steps: Tensor,
    zero_point: Tensor,
    input_bits: int,
    codes: Tensor,
    weight_zero_point: Tensor,
    weight_bits: int,
    cells: Sequence[Cell],
) -> Iterator[Tensor]:
    """Yields the exact sums of t v over each cell, [rows, out] int32.

    Args:
        steps: t = q - z, [rows, in] float32 holding integers.
        zero_point: z of the input, which broadcasts to it; used at 8 bits.
        codes: q of the weight, [out, in] uint8.
        weight_zero_point: z of the weight, [out, groups].
    """
    wide_input, wide_weight = input_bits == 8, weight_bits == 8
    rows = len(steps)
    left = steps
    if wide_input:
        # t = (q - 128) + (127 - z) + 1: the constants' products come from two further rows.
        static = zero_point.ndim == 0 or zero_point.shape[0] != rows or zero_point.shape[-1] != 1
        constant = 127 - zero_point if static else steps.new_zeros(())
        width = steps.shape[1]
        left = torch.cat(
            [steps + zero_point - 128, steps.new_ones(1, width), constant.expand(1, width)]
        )
    left = left.to(torch.int8)
    for cell in cells:
        right = codes[:, cell.channels]
        zero = weight_zero_point[:, cell.group, None]
        # Modulo 256, uint8 arithmetic is int8 arithmetic.
        right = (right - (128 if wide_weight else zero.to(torch.uint8))).view(torch.int8)
        product = _int_mm(left[:, cell.channels], right)
        if wide_input:
            ones, constants = product[rows], product[rows + 1]
            factor = 1 if static else (128 - zero_point).int()
            product = product[:rows] + (ones + constants if static else factor * ones)
        if wide_weight:
            total = steps[:, cell.channels].to(torch.int32).sum(1, keepdim=True, dtype=torch.int32)
            product = product + total * (128 - zero.int()).T
        yield product


def _int_mm(left: Tensor, right: Tensor) -> Tensor:
    """int8 [rows, n] times int8 [out, n], transposed: [rows, out] int32."""
    if left.shape[1] == 1:  # PyTorch 2.13 returns garbage for sums of a single product on a CPU
        left, right = F.pad(left, (0, 1)), F.pad(right, (0, 1))
    left, right = left.contiguous(), right.contiguous().T
    if left.device.type == "cpu" and not _onednn_is_exact():
        return (left.double() @ right.double()).int()  # float64 holds all sums of int32
    return torch._int_mm(left, right)


@cache
def _onednn_is_exact() -> bool:
    """Whether `torch._int_mm` gives exact sums on this CPU.

    PyTorch takes oneDNN if the CPU has AVX-512 VNNI. Where `ONEDNN_MAX_CPU_ISA` forbids oneDNN
    these instructions, it adds pairs of products in 16 bits, which saturate.
    """
    largest = torch.full((64, 64), 127, dtype=torch.int8)
    return all(
        bool((torch._int_mm(largest[:rows], largest) == 64 * 127**2).all()) for rows in (1, 64)
    )


def int4_group_size(out_features: int, in_features: int, group_size: int) -> int | None:
    """The group size with which the stock int4 product takes a layer, or None if it does not."""
    if out_features % INT4_ROWS or not _int4_layout_is_known():
        return None
    accepted = [size for size in INT4_GROUPS if group_size % size == 0 and in_features % size == 0]
    return accepted[0] if accepted else None


def to_int4_layout(codes: Tensor) -> Tensor:
    """Codes [out, in] in the layout of the stock int4 product, [out, in / 2] uint8."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)


def from_int4_layout(packed: Tensor) -> Tensor:
    """The codes [out, in] uint8 that `to_int4_layout` was given.

    Blocks of 64 weight rows, column after column: byte i holds rows i (low) and i + 32; in a
    smaller last block, rows 2 i (low) and 2 i + 1.
    """
    rows, width = packed.shape[0], packed.shape[1] * 2
    codes = packed.new_empty(rows, width)
    flat = packed.flatten()
    for top in range(0, rows, _INT4_BLOCK):
        block = codes[top : top + _INT4_BLOCK]
        part = flat[top * width // 2 :][: block.numel() // 2].view(width, -1).T
        if len(block) == _INT4_BLOCK:
            block[:32], block[32:] = part & 15, part >> 4
        else:
            block[::2], block[1::2] = part & 15, part >> 4
    return codes


def int4_weight_only(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor, group_size: int
) -> Tensor:
    """x [rows, in] times a weight in `to_int4_layout`, transposed: [rows, out] float32.

    Args:
        scale, zero_point: [out, groups of group_size] float32.
    """
    x = x.to(torch.bfloat16)
    rounded = scale.T.to(torch.bfloat16)
    both = torch.stack([rounded, torch.zeros_like(rounded)], dim=2)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, both)
    sums = x.float().unflatten(1, (-1, group_size)).sum(2)
    return y.float() + F.linear(sums, (8 - zero_point) * scale)


@cache
def _int4_layout_is_known() -> bool:
    """Whether this build packs a known weight to what `from_int4_layout` expects."""
    with torch.device("cpu"):  # it may be asked for while a model without memory is built
        codes = torch.randint(0, 16, (112, 64), generator=torch.Generator().manual_seed(0))
        try:
            packed = to_int4_layout(codes)
        except (RuntimeError, AttributeError):  # another build of PyTorch, without the operator
            return False
        return packed.shape == (112, 32) and torch.equal(from_int4_layout(packed).long(), codes)

"""Kernel `int_mm`: PyTorch's int8 x int8 product on a CPU, which sums in int32.

Channels that share the weight's scale s and the input's scale c form a scale run. Sums over a run
are exact; each is then scaled and added in float32 in a model in bf16, and in float64 in any other
model. Steps of up to 7 bits lie in -127 .. 127. At 8 bits the operands are q - 128 instead, and
exact sums make up for the difference. For 8-bit inputs these sums come out of the same product, as
two additional rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from qvlm.packing.kernels.base import Kernel

if TYPE_CHECKING:
    from qvlm.packing.layer import PackedLinear

# Largest number of products of up to 255 * 255 whose int32 sum cannot overflow.
MAX_WIDTH = (2**31 - 1) // 255**2
# Channels that a scale run needs on average. With fewer, scaling costs more than the product.
RUN_WIDTH = 32


@dataclass(frozen=True)
class ScaleRun:
    """Channels that share the weight's scale and the input's scale.

    Attributes:
        channels: Slice of the stored channels, or their indices [n].
        width: Number of channels.
        group: Index of their weight group.
        channel: One of the channels, whose input scale is that of all.
    """

    channels: slice | Tensor
    width: int
    group: int
    channel: int


class _IntMM(Kernel):
    name = "int_mm"
    can_sum_in_float64 = True

    def obstacle(self, layer: PackedLinear) -> str | None:
        if layer.form.weight != "uniform":
            return "its weight is not uniform"
        if layer.codes.device.type not in ("cpu", "meta"):
            return "it is not on the CPU"
        if layer.in_features > MAX_WIDTH:
            return f"a sum over its {layer.in_features} inputs could overflow int32"
        return None

    def is_preferred(self, layer: PackedLinear, rows: int, dtype: torch.dtype) -> bool:
        if self.obstacle(layer) is not None:
            return False
        if layer.codes.is_meta and layer.input_sharing() == "none":
            return False  # without numbers the scale runs are not known
        return layer.in_features >= RUN_WIDTH * len(scale_runs(layer))

    def is_exact(self, layer: PackedLinear, dtype: torch.dtype) -> bool:
        return dtype != torch.bfloat16 and layer.has_integer_product()

    def product(self, layer: PackedLinear, x: Tensor) -> Tensor:
        form = layer.form
        steps, scale, zero_point = layer.stored_steps(x)
        weight_scale, weight_zero_point = layer.weight_scales()
        runs = scale_runs(layer)
        products = int_products(
            steps,
            zero_point,
            form.input_bits,
            layer.stored_codes(),
            weight_zero_point,
            form.weight_bits,
            runs,
        )
        shared = layer.shares_input_scale(scale)
        # In a model in float32 the sum is rounded once, at the end, as in `native`.
        sums = torch.float32 if x.dtype == torch.bfloat16 else torch.float64
        y = torch.zeros(len(x), layer.out_features, dtype=sums, device=x.device)
        for run, product in zip(runs, products, strict=True):
            factor = weight_scale[:, run.group].to(sums)
            if not shared:
                factor = factor * scale.expand(layer.in_features)[run.channel]
            y.addcmul_(product.to(sums), factor)
        return y * scale if shared else y

    def working_bytes(self, layer: PackedLinear, rows: int) -> int:
        """Counts the output twice and the input three times in float32, and the codes in int8."""
        output, entries = rows * layer.out_features, rows * layer.in_features
        return 8 * output + 12 * entries + layer.in_features * layer.out_features


INT_MM = _IntMM()


def scale_runs(layer: PackedLinear) -> list[ScaleRun]:
    """Returns the scale runs of a layer's stored channels, which are found once and then kept."""
    runs: list[ScaleRun] | None = layer.derived.get("scale_runs")
    if runs is None:
        # Without numbers, channels of a weight group that share a scale form a run each.
        meta_groups = layer.codes.is_meta and layer.input_sharing() == "group"
        scales = None if meta_groups else layer.channel_scales()
        runs = find_scale_runs(layer.in_features, layer.form.group_size, scales)
        layer.derived["scale_runs"] = runs
    return runs


def find_scale_runs(width: int, group_size: int, channel_scales: Tensor | None) -> list[ScaleRun]:
    """Finds the scale runs of `width` channels.

    Args:
        width: Number of channels.
        group_size: Number of neighboring channels that share a weight scale.
        channel_scales: Input scale of each channel, [width], or None if all channels share one.
    """
    if channel_scales is None:
        return [
            ScaleRun(slice(at, min(at + group_size, width)), min(group_size, width - at), group, at)
            for group, at in enumerate(range(0, width, group_size))
        ]
    cluster = channel_scales.unique(return_inverse=True)[1]
    group = torch.arange(width, device=cluster.device) // group_size
    key = cluster * (int(group.max()) + 1) + group
    order = torch.argsort(key, stable=True)
    sizes = key[order].unique_consecutive(return_counts=True)[1].tolist()
    return [
        ScaleRun(channels, len(channels), int(group[channels[0]]), int(channels[0]))
        for channels in order.split(sizes)
    ]


def int_products(
    steps: Tensor,
    zero_point: Tensor,
    input_bits: int,
    codes: Tensor,
    weight_zero_point: Tensor,
    weight_bits: int,
    runs: Sequence[ScaleRun],
) -> Iterator[Tensor]:
    """Yields the exact sums of t v over each scale run, [rows, out] int32.

    Args:
        steps: Steps t = q - z of the input, integers in float32, [rows, in].
        zero_point: Zero point z of the input, which broadcasts to `steps`. It is used at 8 bits.
        input_bits: Bit width of the input's codes.
        codes: Codes of the weight, [out, in] uint8.
        weight_zero_point: Zero points of the weight, [out, groups].
        weight_bits: Bit width of the weight's codes.
        runs: Scale runs to sum over.
    """
    wide_input, wide_weight = input_bits == 8, weight_bits == 8
    rows = len(steps)
    left = steps
    if wide_input:
        # t = (q - 128) + (127 - z) + 1. Two additional rows give the products with the constants.
        static = zero_point.ndim == 0 or zero_point.shape[0] != rows or zero_point.shape[-1] != 1
        constant = 127 - zero_point if static else steps.new_zeros(())
        width = steps.shape[1]
        left = torch.cat(
            [steps + zero_point - 128, steps.new_ones(1, width), constant.expand(1, width)]
        )
    left = left.to(torch.int8)
    for run in runs:
        right = codes[:, run.channels]
        zero = weight_zero_point[:, run.group, None]
        # uint8 arithmetic is int8 arithmetic modulo 256.
        right = (right - (128 if wide_weight else zero.to(torch.uint8))).view(torch.int8)
        product = _int_mm(left[:, run.channels], right)
        if wide_input:
            ones, constants = product[rows], product[rows + 1]
            factor = 1 if static else (128 - zero_point).int()
            product = product[:rows] + (ones + constants if static else factor * ones)
        if wide_weight:
            total = steps[:, run.channels].to(torch.int32).sum(1, keepdim=True, dtype=torch.int32)
            product = product + total * (128 - zero.int()).T
        yield product


def _int_mm(left: Tensor, right: Tensor) -> Tensor:
    """Multiplies int8 [rows, n] with int8 [out, n], transposed: [rows, out] int32."""
    if left.shape[1] == 1:  # PyTorch 2.13 returns garbage for sums of a single product on a CPU
        left, right = F.pad(left, (0, 1)), F.pad(right, (0, 1))
    left, right = left.contiguous(), right.contiguous().T
    if left.device.type == "cpu" and not _onednn_is_exact():
        return (left.double() @ right.double()).int()  # float64 holds all sums of int32
    return torch._int_mm(left, right)


@cache
def _onednn_is_exact() -> bool:
    """Tells whether `torch._int_mm` gives exact sums on this CPU.

    PyTorch takes oneDNN if the CPU has AVX-512 VNNI. Where `ONEDNN_MAX_CPU_ISA` forbids oneDNN
    these instructions, it adds pairs of products in 16 bits, which saturate.
    """
    largest = torch.full((64, 64), 127, dtype=torch.int8)
    return all(
        bool((torch._int_mm(largest[:rows], largest) == 64 * 127**2).all()) for rows in (1, 64)
    )

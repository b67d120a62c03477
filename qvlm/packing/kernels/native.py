"""Kernel `native`: products in C for most CPUs, see `native_library.py` and `native.c`.

Where the channels of each weight group share the input's scale, steps and codes are multiplied as
integers. Otherwise, and for NormalFloat, the weight is dequantized in registers, which pays for few
rows only.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qvlm.packing.absmax import kept_absmax_levels, kept_levels
from qvlm.packing.kernels import native_library as library
from qvlm.packing.kernels.base import Kernel, not_finite
from qvlm.packing.kernels.float_weight import working_bytes
from qvlm.packing.kernels.rounding import bf16_operands

if TYPE_CHECKING:
    from qvlm.packing.layer import PackedLinear

# Rows up to which a weight is dequantized in registers, row by row. For more rows it is faster to
# dequantize it into memory once.
FLOAT_ROWS = 32


class _Native(Kernel):
    name = "native"
    can_sum_in_float64 = True

    def obstacle(self, layer: PackedLinear) -> str | None:
        form = layer.form
        if layer.codes.device.type not in ("cpu", "meta"):
            return "it is not on the CPU"
        if not library.takes(layer.in_features, form.weight_bits, form.group_size):
            return f"its groups of {form.group_size} weights begin inside a byte"
        if form.weight != "uniform" and layer.in_features % form.group_size:
            return f"its blocks of {form.group_size} weights cross rows"
        return library.obstacle()

    def sums_in_float64(self, layer: PackedLinear) -> bool:
        return layer.has_integer_product()

    def is_preferred(self, layer: PackedLinear, rows: int, dtype: torch.dtype) -> bool:
        if self.obstacle(layer) is not None:
            return False
        return layer.has_integer_product() or rows <= FLOAT_ROWS

    def is_exact(self, layer: PackedLinear, dtype: torch.dtype) -> bool:
        return dtype != torch.bfloat16 and layer.has_integer_product()

    def product(self, layer: PackedLinear, x: Tensor) -> Tensor:
        layer.use_layout(None)
        if layer.has_integer_product():
            return self._integer_product(layer, x)
        kept, form = _kept(layer), layer.form
        scale, zero_point = kept.grid or _grid(layer, x)
        order = layer.order if form.ordered else None
        x_hat = library.quantized_input(x, scale, zero_point, form.input_bits, order, form.folds)
        multiply = library.rounded_product if _rounds(kept.weight, x) else library.float_product
        return multiply(kept.weight, x_hat)

    def linear(self, layer: PackedLinear, x: Tensor, bias: Tensor | None) -> Tensor:
        """Computes the output with its bias in the dtype of `x`, in one call where it can."""
        layer.use_layout(None)
        called = _kept(layer).layer
        if called is None:
            return super().linear(layer, x, bias)
        y = library.linear(called, x, bias)
        if y is None:
            raise not_finite(layer)
        return y

    def float_weight(self, layer: PackedLinear, rows: slice, dtype: torch.dtype) -> Tensor:
        """Dequantizes rows of the weight, with channels as they are stored; see `reference`."""
        return library.dequantize(_weight(layer), rows, dtype)

    def working_bytes(self, layer: PackedLinear, rows: int) -> int:
        """Counts two float32 copies of the output, and the input.

        The integer product holds one byte of each step, and four more for scales of tokens.
        Otherwise the kernel counts as the reference does.
        """
        if not layer.has_integer_product():
            return working_bytes(layer, rows, copies=1)
        step = 1 if layer.form.inputs == "static" else 5
        return 8 * rows * layer.out_features + step * rows * layer.in_features

    def extra_error(self, layer: PackedLinear, x: Tensor, magnitude: Tensor) -> Tensor | float:
        if layer.has_integer_product() or not _rounds(_weight(layer), x):
            return 0.0
        return bf16_operands(magnitude)

    def _integer_product(self, layer: PackedLinear, x: Tensor) -> Tensor:
        kept, bits = _kept(layer), layer.form.input_bits
        order = layer.order if layer.form.ordered else None
        scale, zero_point = kept.grid or _grid(layer, x)
        y = library.integer_product(kept.weight, x, scale, zero_point, bits, order)
        if layer.form.folds or layer.input_sharing() == "group":
            return y
        return y.mul_(scale if layer.shares_input_scale(scale) else scale[0])


NATIVE = _Native()


def walsh_hadamard_on(device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """Returns the passes of a Hadamard transform in C for a device, or None if there are none."""
    there = device.type == "cpu" and library.obstacle() is None
    return library.walsh_hadamard if there else None


def _grid(layer: PackedLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the grid of an input whose rows have scales of their own."""
    if layer.form.inputs == "token":
        return library.token_grids(x, layer.form.ratio, layer.form.input_bits)
    return layer.input_grid(x)


def _rounds(weight: library.Weight, x: Tensor) -> bool:
    """Whether the product with a dequantized weight rounds its operands to bf16."""
    return x.dtype == torch.bfloat16 and weight.is_paired()


class _Kept(NamedTuple):
    """What is made of a layer's buffers once: a layer of a hundred channels would wait for it.

    Attributes:
        sources: What it was made of: the buffers, and `derived`, which is a new one once buffers
            are filled with other numbers.
        weight: Weight as the library reads it.
        grid: Scale and zero point of a static input, or None.
        layer: The whole layer as the library reads it, or None for scales by position, for which
            it has no such call.
    """

    sources: tuple[object, ...]
    weight: library.Weight
    grid: tuple[Tensor, Tensor] | None
    layer: library.Layer | None

    def has_moved(self) -> bool:
        """Whether a tensor has other memory by now."""
        return (self.layer or self.weight).has_moved()


_KEPT: WeakKeyDictionary[PackedLinear, _Kept] = WeakKeyDictionary()


def _kept(layer: PackedLinear) -> _Kept:
    """Returns what is kept of a layer, made anew if its buffers are other ones or have moved."""
    sources = (layer.derived, *layer._buffers.values())
    kept = _KEPT.get(layer)
    same = kept is not None and all(map(operator.is_, kept.sources, sources))
    if kept is None or not same or kept.has_moved():
        grid = layer.input_grid(layer.codes) if layer.form.inputs == "static" else None
        weight = _new_weight(layer)
        kept = _KEPT[layer] = _Kept(sources, weight, grid, _called(layer, weight, grid))
    return kept


def _called(
    layer: PackedLinear, weight: library.Weight, grid: tuple[Tensor, Tensor] | None
) -> library.Layer | None:
    form = layer.form
    if form.inputs == "position":
        return None
    if not layer.has_integer_product():
        sums = "steps" if form.folds else "float"
    else:
        sums = "scaled" if not form.folds and layer.input_sharing() == "all" else "integer"
    order = layer.order if form.ordered else None
    return library.Layer(weight, form.input_bits, grid, form.ratio, sums, order)


def _weight(layer: PackedLinear) -> library.Weight:
    """Returns a layer's weight as the library reads it."""
    return _kept(layer).weight


def _new_weight(layer: PackedLinear) -> library.Weight:
    form = layer.form
    weight = library.Weight(layer.codes, layer.in_features, form.weight_bits, form.group_size)
    if form.weight == "uniform":
        group_scales = None
        if layer.input_sharing() == "group":
            group_scales = layer.input_scale.view(torch.float32)[:: form.group_size].contiguous()
        return weight.uniform(layer.scale, layer.zero_point, group_scales)
    return weight.normal_float(
        kept_levels(form.weight_bits),
        layer.scale,
        layer.constant_codes if form.constants[0] else None,
        kept_absmax_levels(),
        layer.mean.view(torch.float32).item(),
        form.constant_block_size,
    )

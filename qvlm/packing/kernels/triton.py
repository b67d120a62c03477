"""Kernel `triton`: products on a GPU.

Layers that consist of whole chunks of 64 or 128 channels are multiplied by `triton_products.py`,
other uniform layers by `triton_kernels.py`, NormalFloat by `triton_normal_float.py`. Triton is
imported only for a layer on a GPU, or on a CPU under Triton's interpreter.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qvlm.packing.absmax import kept_absmax_levels, kept_levels
from qvlm.packing.formats import unit
from qvlm.packing.kernels.base import Kernel, require_finite
from qvlm.packing.kernels.rounding import bf16_operands

if TYPE_CHECKING:
    from qvlm.packing.form import Form
    from qvlm.packing.kernels.triton_inputs import Grid, InputLayout
    from qvlm.packing.kernels.triton_launch import Tile
    from qvlm.packing.layer import PackedLinear

CHUNKS = (128, 64)


class _Triton(Kernel):
    name = "triton"

    def obstacle(self, layer: PackedLinear) -> str | None:
        form = layer.form
        if form.weight != "uniform":
            if form.weight_bits != 4 or chunk_size(form) is None:
                return "its weight is neither uniform nor NormalFloat of 4 bits in blocks of 64"
            return device_obstacle(layer.codes.device)
        if not layer.has_integer_product():
            return "the channels of a weight group differ in the scale of their inputs"
        if form.scale_shape[1] > 1 and form.group_size % unit(form.weight_bits)[0]:
            return f"its groups of {form.group_size} weights begin inside a byte"
        return device_obstacle(layer.codes.device)

    def is_preferred(self, layer: PackedLinear, rows: int, dtype: torch.dtype) -> bool:
        """Prefers Triton on a GPU. Warns once for each reason why it cannot run on that GPU."""
        device = layer.codes.device
        if device.type != "cuda":
            return False
        if self.obstacle(layer) is None:
            return True
        if (obstacle := device_obstacle(device)) is not None:
            _warn_once(obstacle)
        return False

    def product(self, layer: PackedLinear, x: Tensor) -> Tensor:
        return self.linear(layer, x, None)

    def linear(self, layer: PackedLinear, x: Tensor, bias: Tensor | None) -> Tensor:
        """Computes the output with its bias in the dtype of `x`."""
        require_finite(layer, x)
        layer.use_layout(None)
        if not len(x):  # a launch has at least one program
            return x.new_empty(0, layer.out_features)
        if layer.form.weight != "uniform":
            return _normal_float_linear(layer, x, bias)
        if chunk_size(layer.form) is None:
            return _tiled_linear(layer, x, bias)
        from qvlm.packing.kernels import triton_inputs

        x, grid = x.contiguous(), input_grid(layer, x)
        q, sums = triton_inputs.quantize(x, grid, input_layout(layer))
        return self.multiply(layer, q, sums, grid, x.dtype, bias)

    def multiply(
        self,
        layer: PackedLinear,
        q: Tensor,
        sums: Tensor,
        grid: Grid,
        dtype: torch.dtype,
        bias: Tensor | None,
        chosen: Tile | None = None,
    ) -> Tensor:
        """Computes the output with its bias for an input that `triton_inputs` has quantized.

        Args:
            layer: Layer of whole chunks, see `chunk_size`, whose codes have no layout of a kernel.
            q, sums: Integers of the input and their sums.
            grid: Scale and zero point that the input was quantized with.
            dtype: Type of the output.
            bias: Bias, [out] float32.
            chosen: Tile of the product; None takes the one in `triton_launch.TILES`.

        Returns:
            Output, [rows, out] of `dtype`.
        """
        from qvlm.packing.kernels import triton_products

        form = layer.form
        weight = triton_products.UniformWeight(
            form.weight_bits,
            layer.codes,
            layer.scale.view(torch.float32),
            layer.zero_point,
            _offsets(layer),
        )
        clusters = layer.input_sharing() == "group"
        layout = input_layout(layer)
        return triton_products.multiply(
            q, sums, grid, layout, weight, dtype, bias, form.folds, clusters, chosen
        )

    def working_bytes(self, layer: PackedLinear, rows: int) -> int:
        """Counts the output in bf16, the quantized input, and a NormalFloat weight in bf16."""
        form = layer.form
        output = 2 * rows * layer.out_features
        if form.weight != "uniform":
            return output + 2 * (rows + layer.out_features) * layer.in_features
        if (chunk := chunk_size(form)) is None:
            return output
        return output + rows * (layer.in_features + 4 * layer.in_features // chunk)

    def extra_error(self, layer: PackedLinear, x: Tensor, magnitude: Tensor) -> Tensor | float:
        """Bounds what bf16 rounds off in the stock product of NormalFloat for many rows."""
        return 0.0 if layer.form.weight == "uniform" else bf16_operands(magnitude)


TRITON = _Triton()


def chunk_size(form: Form) -> int | None:
    """Returns the number of channels of a chunk, or None if a layer does not consist of chunks.

    Each chunk lies in one weight group, and starts at a 32-bit word of codes.
    """
    if form.weight_bits not in (4, 8) or form.in_features % form.group_size:
        return None
    return next((size for size in CHUNKS if form.group_size % size == 0), None)


def input_layout(layer: PackedLinear) -> InputLayout:
    """Returns how the integers of an input are laid out for a layer of whole chunks."""
    from qvlm.packing.kernels.triton_inputs import InputLayout

    form, chunk = layer.form, chunk_size(layer.form)
    assert chunk is not None
    order = layer.order if form.ordered else None
    return InputLayout(form.input_bits, unit(form.weight_bits)[0], chunk, order)


def input_grid(layer: PackedLinear, x: Tensor) -> Grid:
    """Returns scale and zero point of an input [rows, in], whose channels have their own order."""
    from qvlm.packing.kernels import triton_inputs

    if layer.form.inputs == "token":
        return triton_inputs.token_grid(x.contiguous(), layer.form.input_bits, layer.form.ratio)
    if layer.form.inputs == "position":
        return layer.input_grid(x)
    return layer.input_scale.view(torch.float32), layer.input_zero_point


def static_grid(layer: PackedLinear) -> Grid | None:
    """Returns scale and zero point of a static input that a layer takes already quantized.

    None stands for layers with scales of tokens and for those that another kernel serves, or other
    products than `triton_products`.
    """
    form = layer.form
    chunked = form.weight == "uniform" and chunk_size(form) is not None
    if form.inputs != "static" or not chunked or layer.choose(1, torch.bfloat16) != TRITON.name:
        return None
    return layer.input_scale.view(torch.float32), layer.input_zero_point


def device_obstacle(device: torch.device) -> str | None:
    """Returns why Triton's kernels cannot run on a device, or None."""
    if device.type != "cuda" and (device.type != "cpu" or "TRITON_INTERPRET" not in os.environ):
        return "it is not on a GPU"
    from qvlm.packing.kernels import triton_kernels

    return triton_kernels.obstacle(device)


def _tiled_linear(layer: PackedLinear, x: Tensor, bias: Tensor | None) -> Tensor:
    """Computes `linear` for a uniform layer that does not consist of chunks."""
    from qvlm.packing.kernels import triton_kernels

    form = layer.form
    x = layer.as_stored(x)
    return triton_kernels.linear(
        x,
        *layer.input_grid(x),
        form.input_bits,
        layer.codes,
        layer.scale.view(torch.float32),
        layer.zero_point,
        form.weight_bits,
        form.group_size,
        form.folds,
        layer.input_sharing() == "group",
        bias,
    )


def _normal_float_linear(layer: PackedLinear, x: Tensor, bias: Tensor | None) -> Tensor:
    """Computes `linear` for a NormalFloat layer."""
    from qvlm.packing.kernels import triton_normal_float

    form, device = layer.form, layer.codes.device
    levels: tuple[Tensor, Tensor] | None = layer.derived.get("triton_levels")
    if levels is None or levels[0].device != device:
        levels = kept_levels(form.weight_bits).to(device), kept_absmax_levels().to(device)
        layer.derived["triton_levels"] = levels
    weight = triton_normal_float.NormalFloatWeight(
        layer.codes,
        levels[0],
        form.group_size,
        layer.constant_codes if form.constants[0] else None,
        levels[1],
        layer.scale.view(torch.float32),
        layer.mean.view(torch.float32),
        form.constant_block_size,
    )
    x = x.contiguous()
    grid = input_grid(layer, x)
    return triton_normal_float.linear(x, grid, form.input_bits, form.folds, weight, bias)


def _offsets(layer: PackedLinear) -> Tensor | None:
    """Returns `triton_products.offsets` for inputs of 8 bits, which are made once and kept."""
    form, device = layer.form, layer.codes.device
    if form.input_bits != 8:
        return None
    kept: Tensor | None = layer.derived.get("triton_offsets")
    if kept is None or kept.device != device:
        from qvlm.packing.kernels import triton_products

        zero_point = layer.input_zero_point if form.inputs == "static" else None
        chunk = chunk_size(form)
        assert chunk is not None
        kept = triton_products.offsets(layer.stored_codes(), form.weight_bits, zero_point, chunk)
        layer.derived["triton_offsets"] = kept
    return kept


@cache
def _warn_once(obstacle: str) -> None:
    warnings.warn(
        f"Packed layers on this GPU use PyTorch's operators: {obstacle}.",
        RuntimeWarning,
        stacklevel=2,
    )

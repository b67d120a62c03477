"""Kernel `triton`: products on a GPU, see `triton_kernels.py`.

Triton is imported only for a layer on a GPU, or on a CPU under Triton's interpreter.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qvlm.packing.formats import unit
from qvlm.packing.kernels.base import Kernel

if TYPE_CHECKING:
    from qvlm.packing.layer import PackedLinear


class _Triton(Kernel):
    name = "triton"

    def obstacle(self, layer: PackedLinear) -> str | None:
        form = layer.form
        if form.weight != "uniform":
            return "its weight is not uniform"
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
        from qvlm.packing.kernels import triton_kernels

        form = layer.form
        layer.use_layout(None)
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

    def working_bytes(self, layer: PackedLinear, rows: int) -> int:
        """Counts the output in bf16: steps and weights stay in registers."""
        return 2 * rows * layer.out_features


TRITON = _Triton()


def device_obstacle(device: torch.device) -> str | None:
    """Returns why Triton's kernels cannot run on a device, or None."""
    if device.type != "cuda" and (device.type != "cpu" or "TRITON_INTERPRET" not in os.environ):
        return "it is not on a GPU"
    from qvlm.packing.kernels import triton_kernels

    return triton_kernels.obstacle(device)


@cache
def _warn_once(obstacle: str) -> None:
    warnings.warn(
        f"Packed layers on this GPU use PyTorch's operators: {obstacle}.",
        RuntimeWarning,
        stacklevel=2,
    )

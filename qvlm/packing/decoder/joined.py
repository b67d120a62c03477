"""Linears that read the same input, as one product where they quantize it alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvlm.packing.decoder.launches import add_norm, gated
from qvlm.packing.kernels import triton_inputs
from qvlm.packing.kernels.triton import TRITON, input_layout, static_grid
from qvlm.packing.layer import PackedLinear


class Joined:
    """Computes linears that read the same input.

    Args:
        run: Function that maps an input [rows, in] to the output [rows, out] of each linear.
        sizes: Number of outputs of each linear.
        packed: Packed layer that computes all of them, or None.

    Attributes:
        grid: Scale and zero point of the static input of `packed`, if the launch that makes the
            input can also quantize it; otherwise None.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Sequence[Tensor]],
        sizes: Sequence[int],
        packed: PackedLinear | None = None,
    ) -> None:
        self.run, self.sizes, self.packed = run, list(sizes), packed
        transforms = packed is not None and packed.form.hadamard
        self.grid = None if packed is None or transforms else static_grid(packed)

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """Maps [rows, in] to [rows, out] of each linear."""
        return self.run(x)

    def normed(
        self, x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Computes the linears of the RMS norm of x + delta.

        Args:
            x, delta: Tensors [rows, in]; without `delta`, the norm of `x`.
            weight: Weight of the norm, [in].
            epsilon: Number that the norm adds to the mean of squares.

        Returns:
            x + delta, [rows, in], and the output of each linear.
        """
        if self.packed is None or self.grid is None:
            normed = add_norm(x, delta, weight, epsilon)
            return x, self(normed)
        layout = input_layout(self.packed)
        x, q, sums = triton_inputs.quantize_normed(x, delta, weight, epsilon, self.grid, layout)
        return x, self._multiply(q, sums, x.dtype)

    def gated(self, gate: Tensor, up: Tensor) -> Sequence[Tensor]:
        """Computes the linears of silu(gate) * up, [rows, in] each."""
        if self.packed is None or self.grid is None:
            return self(gated(gate, up))
        layout = input_layout(self.packed)
        q, sums = triton_inputs.quantize_gated(gate, up, self.grid, layout)
        return self._multiply(q, sums, gate.dtype)

    def _multiply(self, q: Tensor, sums: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        packed, grid = self.packed, self.grid
        assert packed is not None and grid is not None
        bias = None if packed.bias is None else packed.bias.view(torch.float32)
        packed.used[TRITON.name] += 1
        return TRITON.multiply(packed, q, sums, grid, dtype, bias).split(self.sizes, 1)


def join(layers: Sequence[nn.Module]) -> Joined:
    """Joins linears that read the same input.

    Packed layers are joined if they quantize their input alike. NormalFloat weights are not,
    because each has a mean of its own. Joined layers keep working: their tensors become parts of
    the joined ones.
    """
    sizes = [int(layer.out_features) for layer in layers]  # type: ignore[arg-type]
    if all(isinstance(layer, nn.Linear) for layer in layers):
        weight, bias = _shared(layers, "weight"), _shared(layers, "bias")
        assert weight is not None
        return Joined(lambda x: F.linear(x, weight, bias).split(sizes, 1), sizes)
    packed = [layer for layer in layers if isinstance(layer, PackedLinear)]
    first = packed[0] if packed else None
    if first is not None and len(layers) == 1:
        return Joined(lambda x: [first(x)], sizes, first)
    alike = len(packed) == len(layers) and all(quantizes_alike(packed[0], each) for each in packed)
    if first is None or not alike:
        return Joined(lambda x: [layer(x) for layer in layers], sizes)
    shape = (sum(sizes), *first.form.scale_shape[1:])
    joined = PackedLinear(replace(first.form, out_features=sum(sizes), scale_shape=shape))
    for layer in packed:
        layer.use_layout(None)
    for name in ("codes", "scale", "zero_point", "bias"):
        setattr(joined, name, _shared(packed, name))
    for name in _INPUT_BUFFERS & {*first._buffers}:
        setattr(joined, name, getattr(first, name))
    joined.kernel = first.kernel
    return Joined(lambda x: joined(x).split(sizes, 1), sizes, joined)


_INPUT_BUFFERS = {"input_scale", "input_zero_point", "order"}


def quantizes_alike(layer: PackedLinear, other: PackedLinear) -> bool:
    """Whether one layer of the same kind can hold the weights of both, one above the other.

    That is the case if both weights are uniform with scales of their own for each output, and
    inputs are quantized alike.
    """
    form, shape = layer.form, other.form.scale_shape
    if form.weight != "uniform" or form.scale_shape[0] == 1 or shape[:1] == (1,):
        return False
    if replace(other.form, out_features=form.out_features, scale_shape=form.scale_shape) != form:
        return False
    if shape[1:] != form.scale_shape[1:]:
        return False
    names = _INPUT_BUFFERS & {*layer._buffers}
    return all(torch.equal(getattr(layer, name), getattr(other, name)) for name in names)


def _shared(layers: Sequence[nn.Module], name: str) -> Tensor | None:
    """Joins the tensors of a name, one above the other. Each layer then holds its part of them."""
    parts = [getattr(layer, name) for layer in layers]
    if len(parts) == 1:
        return parts[0]
    if any(part is None for part in parts):
        return None
    joined = torch.cat([part.detach() for part in parts])
    for layer, part in zip(layers, joined.split([len(part) for part in parts]), strict=True):
        parameter = isinstance(getattr(layer, name), nn.Parameter)
        setattr(layer, name, nn.Parameter(part, requires_grad=False) if parameter else part)
    return joined

"""What a packed layer stores: its `Form`, the buffers that follow from it, and their numbers.

Float32 numbers are stored as int32 of the same bits. So `.to(bfloat16)`, or a loader that casts
floating-point tensors, cannot round scales, which decide about codes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qvlm.errors import RunError, UserError
from qvlm.packing.absmax import PackedAbsmax
from qvlm.packing.formats import pack, packed_width
from qvlm.quantization.linear import QuantLinear
from qvlm.quantization.normal_float import NormalFloatQuantizer
from qvlm.quantization.position_quantizer import PositionQuantizer
from qvlm.quantization.quantizer import TokenQuantizer, UniformQuantizer

# Sizes are below this. Kernels take them in 64 bits, where 2^64 would be zero.
MOST = 2**48


@dataclass(frozen=True)
class Form:
    """Sizes and kinds of a packed layer, in plain values that a checkpoint's config.json holds.

    Attributes:
        in_features, out_features: Numbers of input and output channels.
        bias: Whether the layer has a bias.
        weight: "uniform" or "normal_float".
        weight_bits, input_bits: Bit widths of the codes, 2 to 8.
        group_size: Number of neighboring weights that share a scale, or an absmax: `in_features`
            where a row or the whole weight shares it.
        scale_shape: Shape of a uniform weight's scales, [out or 1, groups]; () for NormalFloat.
        inputs: "token" for dynamic scales per token, "static" for calibrated ones of channels, and
            "position" for calibrated ones of the positions of a sequence.
        input_shape: Shape of the calibrated input scales: () or [in], or [positions].
        folds: Whether the input scales are folded into the weight.
        ratio: Factor that shrinks dynamic ranges.
        constants: Of a NormalFloat weight, the number of absmax codes (0 if absmax values are kept
            in float32) and the length of the nested absmax; see `absmax.PackedAbsmax`.
        constant_block_size: Number of absmax codes that share a nested absmax.
        ordered: Whether channels are stored cluster by cluster. Each weight group then lies in one
            cluster of the input, so its channels share both scales.
        hadamard: Whether the input is transformed by a Hadamard matrix before it is quantized (see
            `qvlm.quantization.hadamard`).
    """

    in_features: int
    out_features: int
    bias: bool
    weight: str
    weight_bits: int
    group_size: int
    scale_shape: tuple[int, ...]
    inputs: str
    input_bits: int
    input_shape: tuple[int, ...] = ()
    folds: bool = False
    ratio: float = 1.0
    constants: tuple[int, ...] = ()
    constant_block_size: int = 1
    ordered: bool = False
    hadamard: bool = False

    def __post_init__(self) -> None:
        """Refuses sizes that do not belong together.

        Kernels read memory by these sizes, and a checkpoint of unknown origin states them.

        Raises:
            ValueError: If a field is out of range, or does not follow from the others.
        """
        width, out, group = self.in_features, self.out_features, self.group_size
        _require("in_features and out_features", min(width, out) > 0 and width * out < MOST)
        _require("group_size", 0 < group < MOST)
        for name in ("weight_bits", "input_bits"):
            _require(name, 2 <= getattr(self, name) <= 8)
        _require("inputs", self.inputs in ("token", "static", "position"))
        if self.inputs == "position":
            _require("input_shape", len(self.input_shape) == 1 and self.input_shape[0] > 0)
        else:
            _require("input_shape", self.input_shape in ((), (width,)))
        _require("ratio", 0 < self.ratio <= 1)
        _require("constant_block_size", 0 < self.constant_block_size < MOST)
        if self.weight == "uniform":
            groups = -(-width // group)
            _require("scale_shape", self.scale_shape in ((1, groups), (out, groups)))
            return
        _require("weight", self.weight == "normal_float")
        blocks = -(-width * out // group)
        nested = -(-blocks // self.constant_block_size)
        _require("constants", self.constants in ((0, blocks), (blocks, nested)))


def _require(field: str, fits: bool) -> None:
    if not fits:
        raise ValueError(f"{field} of a packed layer is out of range")


def buffers(form: Form) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Returns the shape and dtype of each buffer of a packed layer, by name.

    The names are those of tensors in checkpoints.
    """
    out, float_bits = form.out_features, torch.int32
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "codes": ((out, packed_width(form.in_features, form.weight_bits)), torch.uint8)
    }
    if form.weight == "uniform":
        found["scale"] = (tuple(form.scale_shape), float_bits)
        found["zero_point"] = (tuple(form.scale_shape), torch.uint8)
    else:
        found["scale"] = ((form.constants[1],), float_bits)
        found["mean"] = ((1,), float_bits)
        if form.constants[0]:
            found["constant_codes"] = ((form.constants[0],), torch.uint8)
    if form.inputs != "token":
        found["input_scale"] = (tuple(form.input_shape), float_bits)
        found["input_zero_point"] = (tuple(form.input_shape), torch.uint8)
    if form.ordered:
        found["order"] = ((form.in_features,), torch.int32)
    if form.bias:
        found["bias"] = ((out,), float_bits)
    return found


def pack_numbers(layer: QuantLinear) -> tuple[Form, dict[str, Tensor]]:
    """Returns the form of a quantized linear, and the tensor of each of its buffers.

    Raises:
        UserError: If a quantizer of the layer has no packed form, or its first token stays in
            floating point. The message names the layer.
        RunError: If the weight differs from what its codes stand for.
    """
    name = layer.layer_name or "a linear"
    if layer.first_token is not None:
        raise UserError(
            f"{name} cannot be packed, because its input stays in floating point at the first "
            "position. Quantize it with quantizer.first_token=quantized."
        )
    quantizer, weight = layer.weight_quantizer, layer.quantized_weight()
    codes = quantizer.quantize(weight)
    # Numbers are compared, not bits: a code of zero may stand for a negative zero.
    if not bool((quantizer.dequantize(codes, weight.dtype) == weight).all()):
        raise RunError(f"The weight of {name} does not lie on the grid of its quantizer.")
    order = quantizer.order if isinstance(quantizer, UniformQuantizer) else None
    fields: dict[str, Any] = {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": layer.bias is not None,
        "weight_bits": quantizer.bits,
        "hadamard": layer.hadamard,
    }
    numbers = {"codes": pack(codes if order is None else codes[:, order], quantizer.bits)}
    for found, tensors in (_weight_scales(layer, name), _input_scales(layer, order, name)):
        fields |= found
        numbers |= tensors
    if order is not None:
        numbers["order"] = order.int()
    if layer.bias is not None:
        numbers["bias"] = as_bits(layer.bias)
    return Form(**fields), {
        key: value.detach().clone().contiguous() for key, value in numbers.items()
    }


def as_bits(x: Tensor) -> Tensor:
    """Returns numbers in float32 as int32 of the same bits."""
    return x.detach().float().contiguous().view(torch.int32)


def _weight_scales(layer: QuantLinear, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns fields of the form and buffers for what scales the weight."""
    quantizer = layer.weight_quantizer
    if isinstance(quantizer, NormalFloatQuantizer):
        absmax = PackedAbsmax.of(quantizer)
        count = 0 if absmax.codes is None else len(absmax.codes)
        fields: dict[str, Any] = {
            "weight": "normal_float",
            "group_size": quantizer.block_size,
            "scale_shape": (),
            "constants": (count, len(absmax.nested)),
            "constant_block_size": absmax.nested_block_size,
        }
        numbers = {"scale": as_bits(absmax.nested), "mean": as_bits(absmax.mean)}
        if absmax.codes is not None:
            numbers["constant_codes"] = absmax.codes
        return fields, numbers
    if not isinstance(quantizer, UniformQuantizer) or quantizer.clusters is not None:
        raise UserError(
            f"The weight of {name} cannot be packed. Choose a uniform quantizer per tensor, "
            "channel or group, or NormalFloat."
        )
    # Scales of shape [], [out, 1] or [out, groups, 1] become [1 or out, groups].
    scale, zero_point = (
        part.flatten(1) if part.ndim > 1 else part.reshape(1, 1)
        for part in (quantizer.scale, quantizer.zero_point)
    )
    fields = {
        "weight": "uniform",
        "group_size": quantizer.group_size or layer.in_features,
        "scale_shape": tuple(scale.shape),
        "ordered": quantizer.order is not None,
    }
    zero_point = _as_code(zero_point, quantizer.bits, f"weight of {name}")
    return fields, {"scale": as_bits(scale), "zero_point": zero_point}


def _input_scales(
    layer: QuantLinear, order: Tensor | None, name: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns fields of the form and buffers for what scales the input."""
    quantizer = layer.input_quantizer
    if isinstance(quantizer, TokenQuantizer):
        return {"inputs": "token", "input_bits": quantizer.bits, "ratio": quantizer.ratio}, {}
    if not isinstance(quantizer, UniformQuantizer) or quantizer.group_size is not None:
        raise UserError(
            f"The input of {name} cannot be packed. Choose a quantizer per tensor, token, "
            "position, channel or cluster of channels."
        )
    scale, zero_point = quantizer.scale, quantizer.zero_point
    positions = isinstance(quantizer, PositionQuantizer)
    if positions:
        scale, zero_point = scale[:, 0], zero_point[:, 0]
    fields = {
        "inputs": "position" if positions else "static",
        "input_bits": quantizer.bits,
        "input_shape": tuple(scale.shape),
        "folds": quantizer.folds,
    }
    if order is not None and scale.ndim and not positions:
        scale, zero_point = scale[order], zero_point[order]
    return fields, {
        "input_scale": as_bits(scale),
        "input_zero_point": _as_code(zero_point, quantizer.bits, f"input of {name}"),
    }


def _as_code(zero_point: Tensor, bits: int, what: str) -> Tensor:
    """Returns zero points as uint8, in which others than codes would become other numbers.

    Raises:
        UserError: If one is not an integer of so many bits.
    """
    if not bool(((zero_point >= 0) & (zero_point < 2**bits) & (zero_point % 1 == 0)).all()):
        raise UserError(
            f"The zero points of the {what} cannot be packed. Choose integers from 0 to "
            f"{2**bits - 1}."
        )
    return zero_point.to(torch.uint8)

"""What a model becomes when it is packed, without a calibration of it.

`put_empty_layers` puts packed layers without numbers into a model on the meta device, whose bytes
are then those of the packed model. `quantize_uncalibrated` quantizes a linear with random inputs in
place of calibration data. Time and memory do not depend on values, so both serve to measure these,
and for nothing else.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qvlm.errors import UserError
from qvlm.packing.form import Form
from qvlm.packing.layer import PackedLinear
from qvlm.quantization.linear import QuantLinear, folded_weight
from qvlm.quantization.normal_float import NormalFloatQuantizer
from qvlm.quantization.ranges import activation_quantizer, check_group_size, weight_quantizer
from qvlm.quantization.spec import QuantizationConfig, QuantSpec
from qvlm.quantization.targets import block_layers, quantizable

# QLoRA's sizes: weights that share an absmax, and absmax values that share a nested absmax.
BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
_SAMPLES = 64


def packed_form(
    linear: nn.Linear, weight: QuantSpec, inputs: QuantSpec, normal_float: bool
) -> Form:
    """Returns the form that a linear has once it is packed.

    Args:
        linear: Linear whose sizes count.
        weight, inputs: How weight and input are quantized.
        normal_float: Whether the weight is NormalFloat as in QLoRA, with the bits of `weight`,
            instead of uniform.

    Raises:
        UserError: If the group size does not divide the number of inputs.
    """
    out, width = linear.weight.shape
    token, position = (inputs.granularity == name for name in ("per_token", "per_position"))
    # How many positions there are is known after calibration; their scales are few.
    shape = () if token or inputs.granularity == "per_tensor" else (1,) if position else (width,)
    common: dict[str, Any] = {
        "in_features": width,
        "out_features": out,
        "bias": linear.bias is not None,
        "weight_bits": weight.bits,
        "inputs": "token" if token else "position" if position else "static",
        "input_bits": inputs.bits,
        "input_shape": shape,
        "folds": inputs.granularity == "per_channel",
    }
    if normal_float:
        blocks = -(-linear.weight.numel() // BLOCK_SIZE)
        return Form(
            weight="normal_float",
            group_size=BLOCK_SIZE,
            scale_shape=(),
            constants=(blocks, -(-blocks // NESTED_BLOCK_SIZE)),
            constant_block_size=NESTED_BLOCK_SIZE,
            **common,
        )
    check_group_size(width, weight)
    weight, inputs = weight.for_width(width), inputs.for_width(width)
    group = weight.group if weight.granularity == "per_group" else width
    rows = 1 if weight.granularity == "per_tensor" else out
    clusters = width if inputs.granularity != "per_channel_group" else inputs.group
    return Form(
        weight="uniform",
        group_size=group,
        scale_shape=(rows, -(-width // group)),
        ordered=group < width and clusters < width and clusters % group == 0,
        **common,
    )


def put_empty_layers(
    model: nn.Module, quantization: QuantizationConfig, normal_float: bool = False
) -> None:
    """Replaces every linear that would be packed with a packed layer on the meta device.

    Args:
        model: Model on the meta device.
        quantization: How weights and activations are quantized.
        normal_float: Whether weights are NormalFloat, see `packed_form`.
    """
    for kind, block in block_layers(model, quantization.vision_tower).values():
        for name, linear in quantizable(block).items():
            inputs = quantization.activation(kind)
            form = packed_form(linear, quantization.weights(kind), inputs, normal_float)
            block.set_submodule(name, PackedLinear(form).to("meta"))


@torch.no_grad()
def quantize_uncalibrated(
    linear: nn.Linear, weight: QuantSpec, inputs: QuantSpec, normal_float: bool
) -> QuantLinear:
    """Quantizes a linear with min-max ranges, as if its inputs were normally distributed.

    Args:
        linear: Linear to quantize.
        weight, inputs, normal_float: As for `packed_form`.

    Raises:
        UserError: If the group size does not divide the number of inputs, or ranges are those of
            positions, whose number only calibration knows.
    """
    if inputs.granularity == "per_position":
        raise UserError(
            "granularity=per_position needs calibration, which there is none of here. Choose one "
            "of: per_tensor, per_token"
        )
    samples = torch.randn(_SAMPLES, linear.in_features, device=linear.weight.device)
    input_quantizer = activation_quantizer(samples, replace(inputs, ranges="minmax"))
    folded = folded_weight(linear.weight, input_quantizer)
    if normal_float:
        quantizer = NormalFloatQuantizer.from_weight(
            folded, weight.bits, BLOCK_SIZE, NESTED_BLOCK_SIZE
        )
        return QuantLinear.from_linear(linear, quantizer, input_quantizer)
    uniform = weight_quantizer(folded, replace(weight, ranges="minmax"), inputs=input_quantizer)
    return QuantLinear.from_linear(linear, uniform, input_quantizer)

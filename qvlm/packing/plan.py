"""What a linear becomes when it is packed, known before there is a weight to pack.

`plan` puts empty packed layers into a model on the meta device: its bytes are then those of the
packed model. `blind` quantizes a linear for real, with random inputs in the place of calibration:
good for time and memory, which do not depend on the values, and for nothing else.
"""

from dataclasses import replace

import torch
from torch import nn

from qvlm.packing.layer import Form, PackedLinear
from qvlm.quantization.linear import QuantLinear, folded_weight
from qvlm.quantization.normal_float import NormalFloatQuantizer
from qvlm.quantization.ranges import activation_quantizer, check_group_size, weight_quantizer
from qvlm.quantization.spec import QuantizationConfig, QuantSpec
from qvlm.quantization.targets import block_layers, quantizable

# QLoRA's sizes: weights that share a constant, and constants that share a scale.
NORMAL_FLOAT_BLOCK = 64
CONSTANT_BLOCK = 256
_SAMPLES = 64


def form(linear: nn.Linear, weight: QuantSpec, inputs: QuantSpec, normal_float: bool) -> Form:
    """The packed form of a linear.

    Args:
        normal_float: weights as in QLoRA, of the bits of `weight`; else uniform.

    Raises:
        UserError: if the groups do not divide its inputs.
    """
    out, width = linear.weight.shape
    token = inputs.granularity == "per_token"
    common = Form(
        in_features=width,
        out_features=out,
        bias=linear.bias is not None,
        weight="normal_float",
        weight_bits=weight.bits,
        group_size=NORMAL_FLOAT_BLOCK,
        scale_shape=(),
        inputs="token" if token else "static",
        input_bits=inputs.bits,
        input_shape=() if token or inputs.granularity == "per_tensor" else (width,),
        folds=inputs.granularity == "per_channel",
    )
    if normal_float:
        blocks = -(-linear.weight.numel() // NORMAL_FLOAT_BLOCK)
        constants = (blocks, -(-blocks // CONSTANT_BLOCK))
        return replace(common, constants=constants, constant_block_size=CONSTANT_BLOCK)
    check_group_size(width, weight)
    group = weight.group_size if weight.granularity == "per_group" else width
    rows = 1 if weight.granularity == "per_tensor" else out
    clusters = width if inputs.granularity != "per_channel_group" else inputs.group_size
    return replace(
        common,
        weight="uniform",
        group_size=group,
        scale_shape=(rows, -(-width // group)),
        ordered=group < width and clusters < width and clusters % group == 0,
    )


def plan(model: nn.Module, quantization: QuantizationConfig, normal_float: bool = False) -> None:
    """Replaces every linear of a model on the meta device that would be packed."""
    for kind, block in block_layers(model, quantization.vision_tower).values():
        for name, linear in quantizable(block).items():
            planned = form(linear, quantization.weight, quantization.activation(kind), normal_float)
            block.set_submodule(name, PackedLinear(planned).to("meta"))


@torch.no_grad()
def blind(
    linear: nn.Linear, weight: QuantSpec, inputs: QuantSpec, normal_float: bool
) -> QuantLinear:
    """A linear quantized with min-max ranges, as if its inputs were normally distributed.

    Raises:
        UserError: if the groups do not divide its inputs.
    """
    samples = torch.randn(_SAMPLES, linear.in_features, device=linear.weight.device)
    input_quantizer = activation_quantizer(samples, replace(inputs, ranges="minmax"))
    folded = folded_weight(linear.weight, input_quantizer)
    if normal_float:
        quantizer = NormalFloatQuantizer.from_weight(
            folded, weight.bits, NORMAL_FLOAT_BLOCK, CONSTANT_BLOCK
        )
        return QuantLinear.from_linear(linear, quantizer, input_quantizer)
    uniform = weight_quantizer(folded, replace(weight, ranges="minmax"), inputs=input_quantizer)
    return QuantLinear.from_linear(linear, uniform, input_quantizer)

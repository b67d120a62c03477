"""The way back from a packed linear to the quantized linear that it was made of."""

import torch

from qvlm.packing.layer import PackedLinear
from qvlm.quantization.linear import QuantLinear
from qvlm.quantization.normal_float import NormalFloatQuantizer
from qvlm.quantization.position_quantizer import PositionQuantizer
from qvlm.quantization.quantizer import Quantizer, TokenQuantizer, UniformQuantizer


@torch.no_grad()
def simulated(layer: PackedLinear, dtype: torch.dtype = torch.float32) -> QuantLinear:
    """Returns the quantized linear that a packed one was made of; it computes the same bits.

    Args:
        layer: Packed linear, which is left unchanged.
        dtype: Float32 or float64, the type that the quantized linear computed in. A packed layer
            does not know it.
    """
    form = layer.form
    bias = None if layer.bias is None else layer.bias.view(torch.float32)
    weight, weights, inputs = layer.dequantized(dtype=dtype), _of_weight(layer), _of_input(layer)
    return QuantLinear(weight, bias, weights, inputs, layer.layer_name, form.hadamard)


def _of_weight(layer: PackedLinear) -> Quantizer:
    form = layer.form
    if form.weight != "uniform":
        absmax = layer.absmax()
        return NormalFloatQuantizer(form.weight_bits, form.group_size, absmax, absmax)
    scale, zero_point = (part[..., None] for part in layer.weight_scales())
    order = layer.order.long() if form.ordered else None
    return UniformQuantizer(form.weight_bits, scale, zero_point, form.group_size, order=order)


def _of_input(layer: PackedLinear) -> Quantizer:
    form = layer.form
    if form.inputs == "token":
        return TokenQuantizer(form.input_bits, form.ratio)
    if form.inputs == "position":
        scale, zero_point = layer.input_scale.view(torch.float32), layer.input_zero_point.float()
        return PositionQuantizer(form.input_bits, scale[:, None], zero_point[:, None])
    scale = layer.in_own_order(layer.input_scale.view(torch.float32))
    zero_point = layer.in_own_order(layer.input_zero_point.float())
    return UniformQuantizer(form.input_bits, scale, zero_point, folds=form.folds)

"""Simulated quantization of a whole model, for as long as its vision tower is fine-tuned."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qvlm.methods.qvlm.candidates import weights_of
from qvlm.methods.qvlm.search_options import SearchOptions
from qvlm.methods.qvlm.vision_loss import Layers
from qvlm.quantization import QuantLinear, UniformQuantizer, Walk
from qvlm.quantization.precision import HALF, settled
from qvlm.quantization.targets import decoder_layers, vision_layers


def simulate(walk: Walk, options: SearchOptions) -> dict[str, nn.Linear]:
    """Quantizes the walk's model with the ranges that every method starts from.

    The quantized linears of the vision tower stay trainable, in float32 or float64. In a model of
    16 bits the others keep their simulated weights in 16 bits, too (bfloat16): nothing trains
    them, and in float32 those of a 13B alone would take 52 GB.

    Args:
        walk: Walk over the model.
        options: Options of the search, which say how weights are quantized.

    Returns:
        Float linears by full name, for `unwind`.
    """
    floats: dict[str, nn.Linear] = {}
    for block in walk.blocks():
        for name, samples in block.linear_inputs().items():
            floats[block.layer_name(name)] = block.linears[name]
            keep = block.kind == "vision"
            weights = weights_of(block.spec(name)[0], options)
            layer = block.quantize_linear(name, samples, weights=weights, keep_float=keep)
            if not keep and floats[block.layer_name(name)].weight.dtype in HALF:
                layer.keep_in(torch.bfloat16)
            block.replace(name, layer)
    return floats


@torch.no_grad()
def unwind(model: PreTrainedModel, floats: Mapping[str, nn.Linear]) -> None:
    """Puts the float linears back, those of the tower with their tuned weights."""
    for full_name, linear in floats.items():
        layer = model.get_submodule(full_name)
        assert isinstance(layer, QuantLinear)
        if layer.float_weight is not None:
            weight: Tensor = layer.float_weight
            inputs = layer.input_quantizer
            if isinstance(inputs, UniformQuantizer) and inputs.folds:
                weight = weight / inputs.scale
            linear.weight.copy_(settled(weight))
            if linear.bias is not None and layer.bias is not None:
                linear.bias.copy_(layer.bias)
        model.set_submodule(full_name, linear)


def freeze(model: PreTrainedModel) -> None:
    """Quantizes the weights that are still trainable for good."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.freeze()


def tower_layers(model: PreTrainedModel) -> Layers:
    """The quantized linears of the vision tower; empty if it is in floating point."""
    return _quantized(vision_layers(model))


def language_layers(model: PreTrainedModel) -> Layers:
    """The quantized linears of the language model that read every token: all but experts."""
    found = _quantized(decoder_layers(model))
    return {name: layer for name, layer in found.items() if ".experts." not in name}


def _quantized(layers: Mapping[str, nn.Module]) -> Layers:
    return {
        f"{name}.{inner}": (layer, layer.input_quantizer)
        for name, module in layers.items()
        for inner, layer in module.named_modules()
        if isinstance(layer, QuantLinear)
    }

"""Models of the true shapes with random weights, in bf16 and in each quantized form."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qvlm.cell import inputs as prepare
from qvlm.config.schema import RunConfig
from qvlm.models.llava import Llava, LlavaArchitecture
from qvlm.models.meta import meta_model
from qvlm.packing import PackedLinear
from qvlm.packing.uncalibrated import quantize_uncalibrated
from qvlm.planning import footprint
from qvlm.planning.footprint import FULL, VARIANTS, Variant
from qvlm.quantization.targets import block_layers, quantizable

PEER = Variant("w4a16", "bitsandbytes NF4")
WITHOUT_KERNELS = "bitsandbytes ran without the kernel for CPUs that it looks for on a hub."
CLUSTERS = tuple(
    Variant(bits, "uniform, clusters", "per_channel_group") for bits in ("w8a8", "w6a6", "w4a4")
)
SIMULATED = Variant("w4a4", "simulated")
OURS = (*VARIANTS, *CLUSTERS)


def shortened(built: LlavaArchitecture, decoder: int, vision: int) -> LlavaArchitecture:
    """Returns a copy of an architecture that has only its first layers.

    Args:
        built: Architecture to copy.
        decoder: Largest number of decoder layers.
        vision: Largest number of layers of the vision tower.
    """
    built = copy.deepcopy(built)
    text = built.text_config
    text.num_hidden_layers = min(decoder, text.num_hidden_layers)
    built.vision_config.num_hidden_layers = min(vision, built.vision_config.num_hidden_layers)
    if getattr(text, "moe_layers", None) is not None:
        text.moe_layers = [index for index in text.moe_layers if index < text.num_hidden_layers]
    return built


def place(
    built: LlavaArchitecture,
    change: Callable[[str, nn.Module], None],
    device: str,
    dtype: torch.dtype = torch.bfloat16,
) -> Llava:
    """Makes a model with random weights, one block at a time.

    Args:
        built: Architecture of the model.
        change: Function that gets the kind of a block and the block, and quantizes it in place.
        device: Device of the weights.
        dtype: Floating-point type of the weights.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = Llava(shortened(built, 0, 0)).to(device).eval()
    finally:
        torch.set_default_dtype(before)
    for part in ("text_config", "vision_config"):
        count = getattr(built, part).num_hidden_layers
        getattr(model.config, part).num_hidden_layers = count
    made: dict[str, nn.Module] = {}
    for name, (kind, block) in block_layers(meta_model(built, dtype), True).items():
        shape = str(block)
        if shape in made:
            block = copy.deepcopy(made[shape])
        else:
            made[shape] = block = _drawn(block, device)
            change(kind, block)
        parent, _, index = name.rpartition(".")
        if kind == "projector":
            model.set_submodule(name, block)
            continue
        attention: Any = block.self_attn
        attention.layer_idx = int(index)  # position in the KV cache
        model.get_submodule(parent).append(block)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def _drawn(block: nn.Module, device: str) -> nn.Module:
    """Gives a block on the meta device random matrices, norms of one and biases of zero."""
    block = block.to_empty(device=device).requires_grad_(False)
    for name, parameter in block.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(float("norm" in name and name.endswith("weight")))
    return block


def changer(model: str, variant: Variant) -> Callable[[str, nn.Module], None]:
    """Returns the function that turns a block of a model into a variant (see `place`)."""
    if variant == FULL:
        return lambda kind, block: None
    if variant == PEER:
        return _bitsandbytes
    quantization = prepare.quantization_config(configuration(model, variant))

    def quantized(kind: str, block: nn.Module) -> None:
        for name, linear in quantizable(block).items():
            inputs = quantization.activation(kind)
            layer = quantize_uncalibrated(
                linear, quantization.weights(kind), inputs, variant.normal_float
            )
            packs = variant != SIMULATED
            block.set_submodule(name, PackedLinear.from_quantized(layer) if packs else layer)

    return quantized


def configuration(model: str, variant: Variant) -> RunConfig:
    """Returns the configuration of a cell of a model and variant."""
    return footprint.configuration(model, variant.bits, variant.granularity)


def _bitsandbytes(kind: str, block: nn.Module) -> None:
    """Replaces the linears of a block by those of bitsandbytes, with NF4 weights."""
    for name, linear in quantizable(block).items():
        block.set_submodule(name, nf4_linear(linear))


def nf4_linear(linear: nn.Linear) -> nn.Module:
    """Returns bitsandbytes' linear with NF4 weights that multiplies inputs in bf16."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    layer.bias = linear.bias
    return layer.to(linear.weight.device)


def shapes_of(built: LlavaArchitecture) -> dict[str, str]:
    """Returns a description of each block of a model, by name. Blocks of one shape share it."""
    blocks = block_layers(meta_model(built, torch.bfloat16), True)
    return {name: str(block) for name, (_, block) in blocks.items()}

"""A tiny LLaMA, and what its layer and its whole model compute in float32 with given weights."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qvlm.quantization.targets import quantizable
from qvlm.tables.peers.modules import random_model

HIDDEN, WIDE = 128, 256
CONFIG = LlamaConfig(
    hidden_size=HIDDEN,
    intermediate_size=WIDE,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def model() -> LlamaForCausalLM:
    """A model of one decoder layer, whose norms differ from one."""
    torch.manual_seed(0)
    made = random_model(CONFIG)
    for name, parameter in made.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
        elif "layers" in name:
            parameter.mul_(5)  # so that a layer changes what passes it
    return made


def inputs(rows: int) -> dict[int, Tensor]:
    """Inputs of a layer's linears by their width."""
    return {width: torch.randn(rows, width) for width in (HIDDEN, WIDE)}


def products(
    model: LlamaForCausalLM, change: Callable[[Tensor], Tensor], x: dict[int, Tensor]
) -> list[Tensor]:
    """Multiplies inputs with each changed weight of a layer in float32."""
    (layer,) = model.model.layers
    linears = quantizable(layer).values()
    return [x[linear.in_features] @ change(linear.weight.float()).T for linear in linears]


@torch.no_grad()
def hidden_states(
    model: LlamaForCausalLM, change: Callable[[Tensor], Tensor], x: Tensor, layers: int
) -> Tensor:
    """Runs embeddings [rows, hidden] through copies of the changed layer, by transformers alone."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config._attn_implementation = layers, "eager"
    reference = LlamaForCausalLM(config).eval()
    reference.model.norm.load_state_dict(model.model.norm.state_dict())
    for layer in reference.model.layers:
        layer.load_state_dict(model.model.layers[0].state_dict())
        for linear in quantizable(layer).values():
            linear.weight.copy_(change(linear.weight))
    return reference.model(inputs_embeds=x[None])[0][0]


def difference(found: Tensor, expected: Tensor) -> float:
    """The relative difference of two tensors, in the Euclidean norm."""
    return float((found.float() - expected).norm() / expected.norm())

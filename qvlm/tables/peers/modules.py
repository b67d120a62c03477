"""Peers whose linears are PyTorch modules, in transformers' LLaMA with our attention."""

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qvlm.models.cache import CACHE, growing_cache
from qvlm.models.llava import prepared_for_decoding
from qvlm.quantization.targets import quantizable
from qvlm.tables.peers.base import Loaded, Peer, Step


class ModulePeer(Peer):
    """A peer that replaces linears by modules of its own."""

    @abstractmethod
    def linear(self, linear: nn.Linear) -> nn.Module:
        """Returns what takes the place of a linear in bf16 without a bias."""

    def load(self, model: LlamaForCausalLM, layers: int) -> Loaded:
        placed = copy.deepcopy(model)
        (layer,) = placed.model.layers
        linears: dict[str, nn.Module] = {}
        for name, linear in quantizable(layer).items():
            linears[name] = self.linear(linear)
            layer.set_submodule(name, linears[name])
        placed.eval()  # bitsandbytes has a product of its own for modules that are not trained
        _stack(placed, layers)

        @torch.no_grad()
        def multiply(inputs: Mapping[int, Tensor]) -> list[Tensor]:
            return [module(inputs[_width(module)]) for module in linears.values()]

        def begin() -> Step:
            cached = {CACHE: growing_cache(placed)}

            @torch.no_grad()
            def step(x: Tensor) -> Tensor:
                return placed.model(inputs_embeds=x[None], **cached)[0][0]

            return step

        return Loaded(sum(map(stored_bytes, linears.values())), lambda: multiply, begin)


def random_model(config: LlamaConfig) -> LlamaForCausalLM:
    """Returns a model in bf16 with random weights and one decoder layer.

    Args:
        config: Shapes of the model. Its vocabulary and number of layers do not count.
    """
    config = copy.deepcopy(config)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 32, None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    prepared_for_decoding(model)
    return model.eval().requires_grad_(False)


def stored_bytes(module: nn.Module) -> int:
    """Returns the bytes of all tensors that a module would save."""
    return sum(value.nbytes for value in module.state_dict().values())


def _stack(model: LlamaForCausalLM, layers: int) -> None:
    """Gives a model of one decoder layer copies of it."""
    (first,) = model.model.layers
    for index in range(1, layers):
        layer: Any = copy.deepcopy(first)
        layer.self_attn.layer_idx = index  # position in the KV cache
        model.model.layers.append(layer)
    model.config.num_hidden_layers = layers


def _width(module: Any) -> int:
    return module.in_features

"""A key-value cache that grows in place.

transformers' `DynamicCache` joins all keys and values with each token's anew. For 600 positions of
a LLaVA-13B layer in bf16 that copies 12 MB per token, as much as the attention itself reads.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer

# Positions that are allocated at once beyond those that are needed.
ROOM = 64

# Name of the argument of a model, and of what it returns, that holds the cache. transformers 5.24
# renamed it.
_ARGUMENTS = signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _ARGUMENTS else "past_key_values"


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, [batch, heads, positions, width], with room for more.

    `keys` and `values` are the filled part of tensors with more positions. What cuts, selects or
    replaces them leaves tensors without room, so the next token allocates it again.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._rooms: dict[str, tuple[Tensor, Tensor]] = {}  # the filled part, and the whole

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends keys and values [batch, heads, new positions, width]; returns all of them."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        """Forgets all positions, and gives their memory back."""
        self._rooms.clear()
        super().reset()

    def _appended(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        filled, room = self._rooms.get(name, (None, new))
        length = held.shape[-2] if held.numel() else 0
        total = length + new.shape[-2]
        mixed = room.is_inference() and not torch.is_inference_mode_enabled()  # no write in place
        if held is not filled or total > room.shape[-2] or mixed:
            room = new.new_empty(*new.shape[:-2], total + ROOM, new.shape[-1])
            room[..., :length, :] = held if length else new[..., :0, :]
        room[..., length:total, :] = new
        self._rooms[name] = room[..., :total, :], room
        return self._rooms[name][0]


def cached_positions(inputs: Mapping[str, Any]) -> int:
    """Returns how many positions the cache among a model's arguments holds, whatever its name."""
    return max((x.get_seq_length() for x in inputs.values() if isinstance(x, Cache)), default=0)


def growing_cache(model: PreTrainedModel) -> DynamicCache:
    """Returns an empty cache for a model. Layers with a window of their own keep transformers'."""
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = GrowingLayer()
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    return cache

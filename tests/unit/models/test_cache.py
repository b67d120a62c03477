"""The cache that grows in place holds what transformers' own holds, whatever is done to it."""

from collections.abc import Callable

import pytest
import torch
from transformers import DynamicCache
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from qvlm.models.architectures import architecture
from qvlm.models.cache import ROOM, GrowingLayer, cached_positions, growing_cache
from qvlm.models.networks import network


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    with torch.device("meta"):
        return network(architecture("smollm2"))(architecture("smollm2"))


CHANGES: dict[str, Callable[[DynamicCache], None]] = {
    "crop": lambda cache: cache.crop(-3),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "reset": lambda cache: cache.reset(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_holds_what_a_dynamic_cache_holds(change: str, model: LlamaForCausalLM) -> None:
    caches, batch = (growing_cache(model), DynamicCache()), 2
    for step in range(3 * ROOM):
        if step in (2, 3, ROOM + 5):
            for cache in caches:
                CHANGES[change](cache)
            batch = {"select": 1, "repeat": 2 * batch}.get(change, batch)
            if change in ("select", "reorder"):  # only once: there must be a second sequence
                change = "crop"
        torch.manual_seed(step)
        new = torch.randn(2, batch, 3, 7 if step == 0 else 1, 8)
        held = [layer.keys for layer in caches[0].layers[:1] if layer.is_initialized]
        before = [(keys, keys.clone()) for keys in held]
        found, expected = (cache.update(*new, 0) for cache in caches)
        assert all(map(torch.equal, found, expected))
        assert all(torch.equal(keys, copy) for keys, copy in before)  # nothing is overwritten
        assert caches[0].get_seq_length() == caches[1].get_seq_length()


def test_it_grows_in_place(model: LlamaForCausalLM) -> None:
    cache = growing_cache(model)
    assert all(type(layer) is GrowingLayer for layer in cache.layers)
    places = set()
    for count in [5, *[1] * ROOM]:
        keys, values = cache.update(*torch.randn(2, 1, 2, count, 4), 0)
        places.add((keys.data_ptr(), values.data_ptr()))
    assert len(places) == 1
    keys, _ = cache.update(*torch.randn(2, 1, 2, 1, 4), 0)
    assert keys.data_ptr() not in {place for place, _ in places}
    assert keys.shape == (1, 2, ROOM + 6, 4)


def test_what_was_begun_in_inference_mode_goes_on_outside() -> None:
    layer, new = GrowingLayer(), torch.randn(1, 1, 2, 4)
    with torch.inference_mode():
        layer.update(new, new)
    keys, _ = layer.update(new, new)
    assert torch.equal(keys, torch.cat([new, new], 2))


def test_gradients_pass_through_it() -> None:
    layer, new = GrowingLayer(), torch.randn(1, 1, 2, 4, requires_grad=True)
    layer.update(new, new)
    keys, _ = layer.update(new, new)
    keys.sum().backward()
    assert new.grad is not None
    assert torch.equal(new.grad, torch.full_like(new, 2))


def test_layers_with_a_window_keep_their_own_cache() -> None:
    class Windowed:
        config = Gemma3TextConfig(num_hidden_layers=6, sliding_window=4)

    kinds = [type(layer).__name__ for layer in growing_cache(Windowed()).layers]  # type: ignore[arg-type]
    assert kinds == ["DynamicSlidingWindowLayer"] * 5 + ["GrowingLayer"]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_positions_are_counted_whatever_the_name_of_the_cache(
    name: str, model: LlamaForCausalLM
) -> None:
    cache = growing_cache(model)
    assert cached_positions({name: cache, "use_cache": True}) == 0
    cache.update(torch.zeros(1, 3, 5, 64), torch.zeros(1, 3, 5, 64), 0)
    assert cached_positions({name: cache}) == 5
    assert cached_positions({"inputs_embeds": torch.zeros(1, 2, 3)}) == 0

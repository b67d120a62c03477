"""Ranges per channel of the prompt at hand, beside a written-out reference."""

import numpy as np
import pytest
import torch
from torch import Tensor

from qvlm.quantization import QuantSpec, activation_quantizer
from qvlm.quantization.prompt_quantizer import PromptQuantizer


def rounded(x: Tensor, lo: Tensor, hi: Tensor, bits: int) -> np.ndarray:
    """`x` on the grid of the ranges [lo, hi], by the formula."""
    low, high = np.minimum(lo.numpy(), 0), np.maximum(hi.numpy(), 0)
    scale = (high - low) / (2**bits - 1)
    zero = np.round(-low / scale)
    return (np.clip(np.round(x.numpy() / scale) + zero, 0, 2**bits - 1) - zero) * scale


def test_a_prompt_has_the_ranges_of_its_own_channels() -> None:
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    expected = rounded(x, x.amin(1, keepdim=True), x.amax(1, keepdim=True), 4)
    assert torch.allclose(PromptQuantizer(4)(x), torch.tensor(expected), atol=1e-5)


def test_decoding_widens_ranges_and_clips_nothing() -> None:
    random = torch.Generator().manual_seed(0)
    prompt, token = torch.randn(2, 6, 4, generator=random), torch.randn(2, 1, 4, generator=random)
    token[0, 0, 2] = 9.0  # beyond everything in the prompt
    quantizer = PromptQuantizer(8)
    quantizer(prompt)
    both = torch.cat([prompt, token], dim=1)
    lo, hi = both.amin(1, keepdim=True), both.amax(1, keepdim=True)
    found = quantizer(token)
    assert torch.allclose(found, torch.tensor(rounded(token, lo, hi, 8)), atol=1e-5)
    assert float((found - token).abs().max()) <= float((hi - lo).max()) / 255


def test_a_new_prompt_begins_anew() -> None:
    random = torch.Generator().manual_seed(0)
    quantizer = PromptQuantizer(4)
    quantizer(100 * torch.randn(2, 6, 4, generator=random))
    x = torch.randn(2, 6, 4, generator=random)
    assert torch.equal(quantizer(x), PromptQuantizer(4)(x))


def test_elements_of_one_scale_take_few_values() -> None:
    x = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0))
    quantizer = PromptQuantizer(3)
    x_hat, index = quantizer(x), quantizer.group_index(x).expand(x.shape)
    assert len(index.unique()) == 6
    for group in index.unique():
        assert len(x_hat[index == group].unique()) <= 8


def test_only_the_stated_width_is_static_and_no_attention_output() -> None:
    spec = QuantSpec(4, "per_channel_prompt", static_width=32)
    assert spec.for_layer("self_attn.q_proj", 32).granularity == "per_channel"
    assert spec.for_layer("self_attn.o_proj", 32).granularity == "per_channel_prompt"
    assert spec.for_layer("mlp.down_proj", 64).granularity == "per_channel_prompt"
    assert isinstance(activation_quantizer(torch.randn(4, 8), spec), PromptQuantizer)


def test_codes_without_their_prompt_are_refused() -> None:
    with pytest.raises(TypeError, match="for_tokens"):
        PromptQuantizer(4).dequantize(torch.zeros(2, 2, dtype=torch.uint8))

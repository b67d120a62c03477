"""Attention of single tokens in C: the same as transformers' own, which serves all else."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qvlm.models import attention
from qvlm.models.architectures import architecture
from qvlm.models.cache import CACHE
from qvlm.models.llava import Llava
from qvlm.packing.kernels import native_library

pytestmark = pytest.mark.instruction_set


def layer(groups: int = 1) -> Any:
    return SimpleNamespace(num_key_value_groups=groups, is_causal=True, training=False)


def operands(queries: int, keys: int, groups: int = 1, heads: int = 8) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((2, heads * groups, queries, 64), *[(2, heads, keys, 64)] * 2)
    return tuple(torch.randn(shape).bfloat16() for shape in shapes)


def reference(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
    """Attention in float64, [batch, queries, heads, width]."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    scores = query.double() @ key.transpose(2, 3) / 8
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return (scores.softmax(3) @ value).transpose(1, 2)


needs_library = pytest.mark.skipif(
    native_library.obstacle() is not None, reason="no product in C runs here"
)


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_a_token_attends_to_many_keys_in_the_library(
    groups: int, padded: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(attention, "sdpa_attention_forward")
    query, key, value = (x.to(dtype) for x in operands(1, 300, groups))
    allowed = None
    if padded:
        allowed = torch.ones(2, 1, 1, 300, dtype=torch.bool)
        allowed[1, ..., :120] = False
    found, weights = attention.attend(layer(groups), query, key, value, allowed, scaling=1 / 8)
    assert weights is None
    expected = reference(query, key, value, allowed)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    error = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    assert float((found.double() - expected).abs().max()) < error * float(expected.abs().max())


@pytest.mark.parametrize(
    ("queries", "width", "dtype", "dropout"),
    [
        (2, 64, torch.bfloat16, 0.0),
        (1, 64, torch.float64, 0.0),
        (1, 24, torch.float32, 0.0),
        (1, 64, torch.float32, 1.0),
    ],
)
def test_all_else_is_sdpa(queries: int, width: int, dtype: torch.dtype, dropout: float) -> None:
    parts = [x[..., :width].to(dtype) for x in operands(queries, 300)]
    allowed = torch.ones(2, 1, queries, 300, dtype=torch.bool).tril(300 - queries)
    options = {"scaling": 1 / 8, "dropout": dropout}
    found, weights = attention.attend(layer(), *parts, allowed, **options)
    assert weights is None
    assert torch.equal(found, sdpa_attention_forward(layer(), *parts, allowed, **options)[0])


def test_an_option_that_changes_scores_is_left_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [x.float() for x in operands(1, 20)]
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *_, **options: (options, None))
    options = {"scaling": 1 / 8, "dropout": 0.0, "sliding_window": None, "use_cache": True}
    for name in ("softcap", "position_bias", "something_new"):
        found, _ = attention.attend(layer(), *parts, None, **options, **{name: 30.0})
        assert found == {**options, name: 30.0}


def test_gradients_pass_through_sdpa() -> None:
    query, key, value = (x.float().requires_grad_() for x in operands(1, 20))
    attention.attend(layer(), query, key, value, None, scaling=1 / 8)[0].sum().backward()
    assert query.grad is not None


@pytest.mark.parametrize("model", ["mini_llava", "mini_moe_llava"])
@torch.no_grad()
def test_models_decode_with_it(model: str) -> None:
    torch.manual_seed(0)
    built = Llava(architecture(model)).eval()
    text = built.config.text_config
    assert text._attn_implementation == attention.NAME
    ids = torch.randint(5, 50, (2, 13))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0

    def logits(dtype: torch.dtype, implementation: str) -> Tensor:
        built.to(dtype)
        text._attn_implementation = implementation
        read = built(input_ids=ids[:, :12], attention_mask=mask[:, :12], use_cache=True)
        cache = read[CACHE]
        return built(input_ids=ids[:, 12:], attention_mask=mask, **{CACHE: cache}).logits

    exact = logits(torch.float32, "sdpa")
    errors = [
        float((logits(torch.bfloat16, name).float() - exact).square().mean())
        for name in (attention.NAME, "sdpa")
    ]
    assert 0 < errors[0] < 2 * errors[1]

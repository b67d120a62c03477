"""A model in float64 computes nothing in float32, and its logits are those of float32."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from qvlm.errors import UserError
from qvlm.models.float64 import RotaryPositions, compute_in_float64
from qvlm.models.mixture import MixtureConfig, MixtureOfExperts
from tests.helpers.toy import toy_batch, toy_llava


class Narrow(TorchDispatchMode):
    """Notes the operators that return a floating-point tensor in another type than float64."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(part, Tensor) and part.is_floating_point() and part.dtype != torch.double:
                self.found.add(str(func))
        return result


def double(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "pixel_values": batch["pixel_values"].double()}


def test_no_operator_of_a_forward_pass_computes_in_float32() -> None:
    model, batch = toy_llava(), double(toy_batch())
    compute_in_float64(model)
    with torch.no_grad(), Narrow() as narrow:
        logits = model(**batch).logits
    assert logits.dtype == torch.float64
    assert narrow.found == set()
    model = toy_llava().double()  # what would be missed otherwise
    with torch.no_grad(), Narrow() as narrow:
        model(**batch)
    assert narrow.found != set()


def test_logits_are_those_of_float32() -> None:
    model = toy_llava()
    with torch.no_grad():
        expected = model(**toy_batch()).logits
        compute_in_float64(model)
        found = model(**double(toy_batch())).logits
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-5)


def test_rotary_positions_are_the_definition() -> None:
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, rope_theta=10000.0)
    positions = torch.tensor([[0, 1, 5, 900]])
    cosine, sine = RotaryPositions(LlamaRotaryEmbedding(config))(torch.zeros(1), positions)
    angles = positions.double()[..., None] * 10000.0 ** -(torch.arange(0, 8, 2).double() / 8)
    assert cosine.dtype == sine.dtype == torch.float64
    torch.testing.assert_close(cosine, torch.cat([angles, angles], -1).cos(), rtol=0, atol=1e-12)
    torch.testing.assert_close(sine, torch.cat([angles, angles], -1).sin(), rtol=0, atol=1e-12)


def test_scaled_rotary_frequencies_are_refused() -> None:
    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=32, num_attention_heads=4))
    rotary.rope_type = "yarn"
    with pytest.raises(UserError, match="model.dtype=float64 is not possible with rope_type=yarn"):
        compute_in_float64(nn.ModuleDict({"rotary": rotary}))


class _Config(LlamaConfig, MixtureConfig):
    pass


def test_a_router_in_float64_sees_what_float32_would_round_away() -> None:
    config = _Config(hidden_size=8, num_experts=4, num_experts_per_token=2)
    mixture = MixtureOfExperts(config, lambda _: nn.Linear(8, 8, bias=False)).double().eval()
    with torch.no_grad():
        mixture.router.weight.zero_()
        mixture.router.weight[1, 0] = 1e-12
    x = torch.ones(1, 8, dtype=torch.float64)
    rows = copy.deepcopy(mixture)
    output = mixture(x)
    with torch.no_grad():  # experts 1 and, of the equal ones, 0
        expected = (rows.experts[1](x) + rows.experts[0](x)) / 2
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)

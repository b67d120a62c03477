"""Fused experts of transformers' own families, taken apart."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    PretrainedConfig,
)

from qvlm.errors import UserError
from qvlm.quantization.experts import Experts, fused_experts, unfuse_experts
from qvlm.quantization.targets import quantizable
from tests.helpers.toy import toy_batch, toy_llava

pytestmark = pytest.mark.instruction_set

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": 4},
    "olmoe": {"num_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "gpt_oss": {
        "num_local_experts": 4,
        "intermediate_size": 24,
        "head_dim": 8,
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v2": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 0,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
    },
}


def language_model(family: str) -> nn.Module:
    torch.manual_seed(0)
    config: PretrainedConfig = AutoConfig.for_model(family, **COMMON | FAMILIES[family])
    return AutoModel.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_separate_experts_compute_what_fused_ones_did(family: str) -> None:
    model = language_model(family)
    ids = torch.randint(1, 64, (3, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state
        parameters = sum(parameter.numel() for parameter in model.parameters())
        assert len(fused_experts(model)) == 2
        assert unfuse_experts(model) == 8
        actual = model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert not fused_experts(model) and unfuse_experts(model) == 0
    linears = quantizable(model)
    found = [name for name in linears if name.startswith("layers.1.mlp.experts.")]
    assert found == [
        f"layers.1.mlp.experts.{expert}.{part}_proj"
        for expert in range(4)
        for part in ("gate", "up", "down")
    ]
    last = {name.rpartition(".")[2] for name in linears}
    assert not last & {"router", "gate", "shared_expert_gate"}


def test_an_expert_sees_the_tokens_routed_to_it() -> None:
    model = toy_llava("mixtral")
    unfuse_experts(model)
    experts = model.model.language_model.layers[0].mlp.experts
    assert isinstance(experts, Experts)
    hidden = torch.randn(6, 32)
    chosen = torch.tensor([[0, 1], [0, 3], [1, 0], [3, 1], [0, 1], [1, 3]])
    seen: dict[int, torch.Tensor] = {}
    for index, expert in enumerate(experts):
        expert.register_forward_pre_hook(lambda _, args, i=index: seen.update({i: args[0]}))
    output = experts(hidden, chosen, torch.ones(6, 2))
    assert sorted(seen) == [0, 1, 3]
    for index, tokens in seen.items():
        assert torch.equal(tokens, hidden[(chosen == index).any(1)])
    expected = torch.stack(
        [
            experts[a](token) + experts[b](token)
            for token, (a, b) in zip(hidden, chosen.tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(output, expected)


def test_logits_of_a_llava_stay() -> None:
    model, batch = toy_llava("mixtral"), toy_batch()
    before = model(**batch).logits
    assert unfuse_experts(model) == 8
    torch.testing.assert_close(model(**batch).logits, before)
    assert unfuse_experts(toy_llava("llama")) == 0


@pytest.mark.parametrize("attribute", ["is_transposed", "is_concatenated"])
def test_a_module_that_says_of_itself_what_is_not_so_is_refused_by_name(attribute: str) -> None:
    model = language_model("gpt_oss")
    experts: Any = model.get_submodule("layers.0.mlp.experts")
    setattr(experts, attribute, not getattr(experts, attribute))
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.experts \(GptOssExperts\)"):
        unfuse_experts(model)


class CappedExperts(nn.Module):
    """Looks like any fused module but caps its gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 12, 8))
        self.down_proj = nn.Parameter(torch.randn(2, 8, 6))
        self.act_fn = nn.SiLU()

    def forward(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        output = torch.zeros_like(hidden)
        for row, experts in enumerate(index.tolist()):
            for slot, expert in enumerate(experts):
                gate, up = (self.gate_up_proj[expert] @ hidden[row]).chunk(2)
                routed = self.down_proj[expert] @ (self.act_fn(gate.clamp_max(0.5)) * up)
                output[row] += weights[row, slot] * routed
        return output


def test_experts_that_compute_something_else_are_refused() -> None:
    with pytest.raises(UserError, match="CappedExperts"):
        unfuse_experts(nn.ModuleDict({"experts": CappedExperts()}))

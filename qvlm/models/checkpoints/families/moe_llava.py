"""The family of MoE-LLaVA: `LanguageBind/MoE-LLaVA-*` on StableLM, Phi-2 or Qwen.

The format is LLaVA's with an object `moe`. The experts have the tensor names of DeepSpeed's
mixture.
"""

from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig

from qvlm.models.checkpoints.families import llava
from qvlm.models.checkpoints.families.blueprint import Blueprint, Facts, Renamings
from qvlm.models.moe_language_models import MoePhiConfig, MoeQwenConfig, MoeStableLmConfig

NAMES: Renamings = (
    # Qwen alone names its tensors as GPT-2 does, below `transformer`, and keeps query, key and
    # value in one tensor (see `split`). The first group turns these names into LLaVA's.
    (r"^transformer\.h\.(\d+)\.ln_1\.", r"model.layers.\1.input_layernorm."),
    (r"^transformer\.h\.(\d+)\.ln_2\.", r"model.layers.\1.post_attention_layernorm."),
    (r"^transformer\.h\.(\d+)\.attn\.c_attn\.", r"model.layers.\1.self_attn.qkv_proj."),
    (r"^transformer\.h\.(\d+)\.attn\.c_proj\.", r"model.layers.\1.self_attn.o_proj."),
    (r"^transformer\.h\.(\d+)\.mlp\.(.*\.)?w1\.", r"model.layers.\1.mlp.\2up_proj."),
    (r"^transformer\.h\.(\d+)\.mlp\.(.*\.)?w2\.", r"model.layers.\1.mlp.\2gate_proj."),
    (r"^transformer\.h\.(\d+)\.mlp\.(.*\.)?c_proj\.", r"model.layers.\1.mlp.\2down_proj."),
    (r"^transformer\.h\.", "model.layers."),
    (r"^transformer\.wte\.", "model.embed_tokens."),
    (r"^transformer\.ln_f\.", "model.norm."),
    (r"^transformer\.", "model."),
    *llava.NAMES,
    (r"\.mlp\.deepspeed_moe\.gate\.wg\.", ".mlp.router."),
    (r"\.mlp\.deepspeed_moe\.experts\.deepspeed_experts\.", ".mlp.experts."),
)


def read_moe_llava(facts: Facts, kind: str) -> Blueprint:
    """Reads a config.json of MoE-LLaVA.

    Args:
        facts: Content of config.json.
        kind: Architecture that config.json names, one of `KINDS`.
    """
    moe = facts.section("moe")
    experts = moe.need("num_experts")
    layers = moe.need("moe_layers_idx")
    moe.refuse_unless("num_experts", experts, ([experts[0]] * len(layers),))
    moe.refuse_unless("use_residual", moe.get("use_residual", False), (False,))
    text = KINDS[kind](
        facts,
        vocab_size=facts.need("vocab_size"),
        hidden_size=facts.need("hidden_size"),
        num_hidden_layers=facts.need("num_hidden_layers"),
        num_attention_heads=facts.need("num_attention_heads"),
        tie_word_embeddings=facts.get("tie_word_embeddings", False),
        num_experts=experts[0],
        num_experts_per_token=moe.refuse_unless("top_k_experts", moe.need("top_k_experts"), (2,)),
        moe_layers=layers,
        capacity_factor=float(moe.need("eval_capacity_factor")),
        min_capacity=moe.need("min_capacity"),
        **llava.special_tokens(facts),
    )
    return Blueprint(
        text,
        vision_tower=facts.need("mm_image_tower"),
        projector_type=llava.projector(facts, "image_projector_type"),
        renamings=NAMES,
        **llava.image_facts(facts),
    )


def _stablelm(facts: Facts, **common: Any) -> MoeStableLmConfig:
    return MoeStableLmConfig(
        intermediate_size=facts.need("intermediate_size"),
        num_key_value_heads=facts.get("num_key_value_heads", 32),
        max_position_embeddings=facts.get("max_position_embeddings", 4096),
        layer_norm_eps=facts.get("norm_eps", 1e-5),
        use_qkv_bias=facts.get("use_qkv_bias", True),
        rope_parameters=_rope(facts.get("rope_theta", 10_000), facts.get("rope_pct", 0.25)),
        **common,
    )


def _phi(facts: Facts, **common: Any) -> MoePhiConfig:
    facts.refuse_unless("rope_scaling", facts.get("rope_scaling", None), (None,))
    return MoePhiConfig(
        intermediate_size=facts.need("intermediate_size"),
        num_key_value_heads=facts.get("num_key_value_heads", common["num_attention_heads"]),
        hidden_act=facts.get("hidden_act", "gelu_new"),
        max_position_embeddings=facts.get("max_position_embeddings", 2048),
        layer_norm_eps=facts.get("layer_norm_eps", 1e-5),
        qk_layernorm=facts.get("qk_layernorm", False),
        rope_parameters=_rope(
            facts.get("rope_theta", 10_000), facts.get("partial_rotary_factor", 0.5)
        ),
        **common,
    )


def _qwen(facts: Facts, **common: Any) -> MoeQwenConfig:
    """Describes the first Qwen as a Qwen2.

    Its MLP is `c_proj(w1(x) * silu(w2(x)))`, where each half is `intermediate_size / 2` wide.
    """
    heads, width = common["num_attention_heads"], common["hidden_size"]
    facts.refuse_unless("kv_channels", facts.get("kv_channels", 128), (width // heads,))
    facts.refuse_unless("no_bias", facts.get("no_bias", True), (True,))
    facts.refuse_unless("rotary_pct", facts.get("rotary_pct", 1.0), (1.0,))
    return MoeQwenConfig(
        intermediate_size=facts.need("intermediate_size") // 2,
        num_key_value_heads=heads,
        max_position_embeddings=facts.need("seq_length"),
        rms_norm_eps=facts.get("layer_norm_epsilon", 1e-6),
        rope_parameters=_rope(facts.get("rotary_emb_base", 10_000)),
        **common,
    )


def _rope(theta: float, rotated_share: float | None = None) -> dict[str, Any]:
    """Describes unscaled rotary positions.

    Args:
        theta: Base of the frequencies.
        rotated_share: Share of each head's dimensions that is rotated; None rotates all.
    """
    partial = {} if rotated_share is None else {"partial_rotary_factor": rotated_share}
    return {"rope_type": "default", "rope_theta": float(theta), **partial}


_LANGUAGE_MODELS: dict[str, Callable[..., PretrainedConfig]] = {
    "Stablelm": _stablelm,
    "Phi": _phi,
    "QWen": _qwen,
}
ARCHITECTURES = tuple(f"MoELLaVA{name}ForCausalLM" for name in _LANGUAGE_MODELS)
# Each language model has three spellings: as trained, as evaluated, and the `model_type`.
KINDS: dict[str, Callable[..., PretrainedConfig]] = {
    kind: read
    for name, read in _LANGUAGE_MODELS.items()
    for kind in (
        f"MoELLaVA{name}ForCausalLM",
        f"EvalMoELLaVA{name}ForCausalLM",
        f"moe_llava_{name.lower()}",
    )
}

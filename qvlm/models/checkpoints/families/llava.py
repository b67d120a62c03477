"""The family of LLaVA: `liuhaotian/llava-*` and `ChangyuanWang/LLaVA-*`.

All keys stand flat in config.json. Tensors are named `model.layers.*`, `model.mm_projector.*` and,
where the checkpoint carries its tower, `model.vision_tower.vision_tower.vision_model.*`. MoE-LLaVA
extends this format, so it shares the renamings and the keys about images.
"""

from typing import Any

from transformers import LlamaConfig

from qvlm.models.checkpoints.families.blueprint import Blueprint, Facts, Renamings

ARCHITECTURE = "LlavaLlamaForCausalLM"
KINDS = (ARCHITECTURE, "llava", "llava_llama")
NAMES: Renamings = (
    (r"^model\.(vision|image)_tower\.\1_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^model\.mm_projector\.(image_spatial_proj\.)?2\.", "model.multi_modal_projector.linear_2."),
    (
        r"^model\.mm_projector\.(image_spatial_proj\.)?(0\.)?",
        "model.multi_modal_projector.linear_1.",
    ),
    (r"^model\.(layers|embed_tokens|norm|final_layernorm)\.", r"model.language_model.\1."),
)


def read_llava(facts: Facts) -> Blueprint:
    """Reads a config.json of LLaVA on LLaMA."""
    heads = facts.need("num_attention_heads")
    rope = {"rope_theta": facts.get("rope_theta", 10_000.0), "rope_type": "default"}
    scaling = facts.get("rope_scaling", None)
    if scaling is not None:
        rope |= {"rope_type": scaling["type"], "factor": scaling["factor"]}
    text = LlamaConfig(
        **{key: facts.need(key) for key in ("vocab_size", "hidden_size", "intermediate_size")},
        num_hidden_layers=facts.need("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=facts.get("num_key_value_heads", heads),
        hidden_act=facts.get("hidden_act", "silu"),
        max_position_embeddings=facts.get("max_position_embeddings", 2048),
        rms_norm_eps=facts.get("rms_norm_eps", 1e-6),
        rope_parameters=rope,
        tie_word_embeddings=facts.get("tie_word_embeddings", False),
        **special_tokens(facts),
    )
    return Blueprint(
        text,
        vision_tower=facts.need("mm_vision_tower"),
        projector_type=projector(facts, "mm_projector_type"),
        renamings=NAMES,
        **image_facts(facts),
    )


def projector(facts: Facts, key: str) -> str:
    """Reads the type of the projector, which is linear where it is not stated."""
    return facts.refuse_unless(key, facts.get(key, "linear"), ("linear", "mlp2x_gelu"))


def special_tokens(facts: Facts) -> dict[str, Any]:
    """Reads the ids of the special tokens; None where one is not stated."""
    return {key: facts.get(key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


def image_facts(facts: Facts) -> dict[str, Any]:
    """Reads the fields of a `Blueprint` that say how images are encoded."""
    feature = facts.get("mm_vision_select_feature", "patch")
    facts.refuse_unless("mm_vision_select_feature", feature, ("patch", "cls_patch"))
    fit = facts.get("image_aspect_ratio", "square")
    facts.refuse_unless("image_aspect_ratio", fit, ("square", "pad"))
    wrapped = facts.get("mm_use_im_start_end", False)
    return {
        "vision_layer": facts.get("mm_vision_select_layer", -2),
        "vision_width": facts.need("mm_hidden_size"),
        "class_token": feature == "cls_patch",
        "image_fit": "pad" if fit == "pad" else "crop",
        "image_text": "<im_start><image><im_end>" if wrapped else "<image>",
    }

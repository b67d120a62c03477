"""The family of `llava-hf/*`: transformers' own format, with old and new tensor names."""

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig

from qvlm.models.checkpoints.families.blueprint import Blueprint, Facts, Renamings, vision_config

ARCHITECTURE = "LlavaForConditionalGeneration"
LANGUAGE_MODEL = "LlamaForCausalLM"  # without vision: `qvlm.models.checkpoints.language_model`
NAMES: Renamings = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.(model\.)?", "model.language_model."),
    (r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
)
# The names that transformers gives to the tensors of our own classes when it saves them.
OWN_NAMES: Renamings = ((r"^model\.language_model\.model\.", "model.language_model."),)


def read_transformers_llava(content: Mapping[str, Any], facts: Facts) -> Blueprint:
    """Reads a config.json of transformers' LLaVA on LLaMA."""
    text = dict(content["text_config"])
    kind = text.pop("model_type", "llama")
    facts.refuse_unless("text_config.model_type", kind, ("llama",))
    strategy = facts.get("vision_feature_select_strategy", "default")
    return Blueprint(
        LlamaConfig(**text),
        projector_type="mlp2x_gelu",
        projector_act=facts.get("projector_hidden_act", "gelu"),
        projector_bias=facts.get("multimodal_projector_bias", True),
        vision_layer=facts.get("vision_feature_layer", -2),
        class_token=strategy == "full",
        vision=vision_config(content["vision_config"]),
        image_token_id=facts.get("image_token_index", facts.get("image_token_id", None)),
        renamings=NAMES,
    )

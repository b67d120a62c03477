"""The architectures of the known checkpoints, built without their files.

Memory and speed depend on entries of each checkpoint's config.json and of CLIP's two towers, which
are public. Those entries are repeated here, and go through the same reader (`families`) into the
same classes as a real config.json.
"""

from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig

from qvlm.errors import UserError
from qvlm.models.checkpoints.families import read_blueprint, read_config
from qvlm.models.checkpoints.language_model import is_language_model, read_language_model
from qvlm.models.checkpoints.own import read_architecture
from qvlm.models.llava import LlavaArchitecture
from qvlm.models.load import MINIATURES, embedded
from qvlm.models.networks import Architecture

IMAGE_TOKEN_ID = 16  # one of SmolLM2's special tokens that no text has
_LLAVA_7B: dict[str, Any] = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "mm_vision_tower": "openai/clip-vit-large-patch14",
    "mm_hidden_size": 1024,
}
_LLAVA_13B = _LLAVA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
_V15 = {
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
    "max_position_embeddings": 4096,
    "image_aspect_ratio": "pad",
}
_MOE = {
    "num_experts": [4] * 12,
    "top_k_experts": 2,
    "moe_layers_idx": list(range(0, 24, 2)),
    "eval_capacity_factor": 2.0,
    "min_capacity": 0,
}
_MOE_LLAVA = {
    "architectures": ["MoELLaVAStablelmForCausalLM"],
    "vocab_size": 100352,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "mm_image_tower": "openai/clip-vit-large-patch14-336",
    "image_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 1024,
    "moe": _MOE,
}
_MOE_LLAVA_PHI2 = _MOE_LLAVA | {
    "architectures": ["MoELLaVAPhiForCausalLM"],
    "vocab_size": 51200,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "partial_rotary_factor": 0.4,
    "moe": _MOE | {"num_experts": [4] * 16, "moe_layers_idx": list(range(0, 32, 2))},
}
_MOE_LLAVA_QWEN = _MOE_LLAVA | {
    "architectures": ["MoELLaVAQWenForCausalLM"],
    "vocab_size": 151936,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "seq_length": 8192,
}
_SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
KNOWN: dict[str, dict[str, Any]] = {
    "llava_13b": _LLAVA_13B,
    "llava_7b": _LLAVA_7B,
    "llava_v15_13b": _LLAVA_13B | _V15,
    "llava_v15_7b": _LLAVA_7B | _V15,
    "moe_llava": _MOE_LLAVA,
    "moe_llava_phi2": _MOE_LLAVA_PHI2,
    "moe_llava_qwen": _MOE_LLAVA_QWEN,
    "smollm2": _SMOLLM2,
}
WITH_TOWERS = {"smollm2_llava": ("smollm2", "mini_llava")}  # language model, tower of


def architecture(name: str) -> Architecture:
    """Returns the configuration of an embedded miniature or a model in `KNOWN` or `WITH_TOWERS`.

    Raises:
        UserError: If there is no such model.
    """
    owner = f"model {name}"
    if name in WITH_TOWERS:
        text, source = map(architecture, WITH_TOWERS[name])
        assert isinstance(text, LlamaConfig) and isinstance(source, LlavaArchitecture)
        return with_tower(text, source)
    if name in KNOWN and is_language_model(KNOWN[name]):
        return read_language_model(KNOWN[name], owner)
    if name in KNOWN:
        blueprint = read_blueprint(KNOWN[name], owner)
        return blueprint.architecture(clip_tower(str(blueprint.vision_tower)), owner)
    if folder := embedded(name):
        return read_architecture(read_config(folder, owner), owner)
    miniatures = sorted(folder.name for folder in MINIATURES.iterdir() if folder.is_dir())
    known = ", ".join([*miniatures, *KNOWN, *WITH_TOWERS])
    raise UserError(f"model {name!r} is not known. Choose one of: {known}.")


def with_tower(
    text: LlamaConfig, source: LlavaArchitecture, begins_with_bos: bool = False
) -> LlavaArchitecture:
    """Returns the configuration of a language model with the tower of a LLaVA and one linear.

    Args:
        text: Configuration of the language model.
        source: Configuration of the LLaVA whose tower it gets.
        begins_with_bos: Whether a text begins with the bos token.
    """
    return LlavaArchitecture(
        vision_config=source.vision_config,
        text_config=text,
        image_token_index=min(IMAGE_TOKEN_ID, text.vocab_size - 1),
        image_seq_length=source.image_seq_length,
        vision_feature_layer=source.vision_feature_layer,
        vision_feature_select_strategy=source.vision_feature_select_strategy,
        projector_type="linear",
        tie_word_embeddings=bool(text.tie_word_embeddings),
        begins_with_bos=begins_with_bos,
    )


def clip_tower(repository: str) -> CLIPVisionConfig:
    """Returns the configuration of CLIP ViT-L/14.

    Args:
        repository: Repository of the tower. If its name ends in "-336", images have 336 pixels.
    """
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336 if repository.endswith("-336") else 224,
        patch_size=14,
    )

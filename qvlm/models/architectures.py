"""The architectures of the known checkpoints, built without one.

What a size or a speed hangs on is public: it stands in the config.json of each checkpoint and of
CLIP's two towers, and the entries that matter are repeated here. They take the same way as a real
config.json (`families`), and end in the same classes.
"""

from typing import Any

from transformers import CLIPVisionConfig

from qvlm.errors import UserError
from qvlm.models.checkpoints.families import read_blueprint
from qvlm.models.llava import LlavaArchitecture
from qvlm.models.load import MINIATURES, embedded

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
KNOWN: dict[str, dict[str, Any]] = {
    "llava_13b": _LLAVA_13B,
    "llava_7b": _LLAVA_7B,
    "llava_v15_13b": _LLAVA_13B | _V15,
    "llava_v15_7b": _LLAVA_7B | _V15,
    "moe_llava": _MOE_LLAVA,
    "moe_llava_phi2": _MOE_LLAVA_PHI2,
    "moe_llava_qwen": _MOE_LLAVA_QWEN,
}


def architecture(name: str) -> LlavaArchitecture:
    """The configuration of an embedded miniature or of a model of `KNOWN`.

    Raises:
        UserError: if there is none of this name.
    """
    if name in KNOWN:
        blueprint = read_blueprint(KNOWN[name], f"model {name}")
        return blueprint.architecture(clip_tower(str(blueprint.vision_tower)), f"model {name}")
    if folder := embedded(name):
        return LlavaArchitecture.from_pretrained(folder)
    here = sorted(folder.name for folder in MINIATURES.iterdir() if folder.is_dir())
    raise UserError(f"model {name!r} is not known; accepted are {', '.join([*here, *KNOWN])}")


def image_tokens(architecture: LlavaArchitecture) -> int:
    """Positions that one image takes in the language model: its patches."""
    vision = architecture.vision_config
    whole = architecture.vision_feature_select_strategy == "full"
    return (vision.image_size // vision.patch_size) ** 2 + whole


def clip_tower(repository: str) -> CLIPVisionConfig:
    """CLIP ViT-L/14, at 336 pixels where the repository's name says so."""
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336 if repository.endswith("-336") else 224,
        patch_size=14,
    )

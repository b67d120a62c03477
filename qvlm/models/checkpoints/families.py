"""What the config.json of a checkpoint says, for each family that we can read.

A family is a way to write config.json and to name tensors:

- LLaVA: `liuhaotian/llava-*`, everything flat in config.json, tensors `model.layers.*`,
  `model.mm_projector.*` and sometimes `model.vision_tower.vision_tower.vision_model.*`.
- MoE-LLaVA: `LanguageBind/MoE-LLaVA-*` on StableLM, Phi-2 or Qwen, tensors of DeepSpeed's mixture.
- hub: `llava-hf/*`, transformers' own format, old names and new.

The facts become a `Blueprint`: the configuration of our class, and how tensors are renamed. What is
not stated gets the default of the family's own code, not of ours; what is not supported is refused.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig, LlamaConfig, PretrainedConfig

from qvlm.errors import UserError
from qvlm.models.llava import LlavaArchitecture
from qvlm.models.moe import MoePhiConfig, MoeQwenConfig, MoeStableLmConfig

Renamings = tuple[tuple[str, str], ...]

# Qwen names all as GPT-2 does, below `transformer`, as no other family does, and keeps query,
# key and value in one tensor: see `split`. What these become are LLaVA's names.
_QWEN_NAMES: Renamings = (
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
)
LLAVA_NAMES: Renamings = (
    *_QWEN_NAMES,
    (r"^model\.(vision|image)_tower\.\1_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^model\.mm_projector\.(image_spatial_proj\.)?2\.", "model.multi_modal_projector.linear_2."),
    (
        r"^model\.mm_projector\.(image_spatial_proj\.)?(0\.)?",
        "model.multi_modal_projector.linear_1.",
    ),
    (r"^model\.(layers|embed_tokens|norm|final_layernorm)\.", r"model.language_model.\1."),
    (r"\.mlp\.deepspeed_moe\.gate\.wg\.", ".mlp.router."),
    (r"\.mlp\.deepspeed_moe\.experts\.deepspeed_experts\.", ".mlp.experts."),
)
HUB_NAMES: Renamings = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.(model\.)?", "model.language_model."),
    (r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
)
# What transformers calls the tensors of our own classes when it saves them.
OWN_NAMES: Renamings = ((r"^model\.language_model\.model\.", "model.language_model."),)
TOWER_NAMES: Renamings = ((r"^vision_model\.", "model.vision_tower."),)


@dataclass(frozen=True)
class Blueprint:
    """What a checkpoint's config.json says.

    Attributes:
        text: the language model.
        projector_type: "linear" or "mlp2x_gelu".
        vision_layer: the tower's layer whose features are taken.
        vision_width: width of these features, or None where config.json does not repeat it.
        class_token: whether the class token is kept among the features.
        vision_tower: the repository or folder of the tower, as the authors had it.
        vision: the tower, where config.json describes it; else its own repository does.
        image_token_id: of `<image>`, where the vocabulary has one.
        image_fit: "crop" or "pad".
        image_text: what stands for an image in a prompt.
        renamings: patterns of the names of tensors, and what they become here.
    """

    text: PretrainedConfig
    projector_type: str
    vision_layer: int
    renamings: Renamings
    vision_width: int | None = None
    class_token: bool = False
    vision_tower: str | None = None
    vision: CLIPVisionConfig | None = None
    image_token_id: int | None = None
    image_fit: str = "crop"
    image_text: str = "<image>"
    projector_act: str = "gelu"
    projector_bias: bool = True

    def architecture(self, vision: CLIPVisionConfig, owner: str) -> LlavaArchitecture:
        """The configuration of our class, with this tower.

        Raises:
            UserError: if the tower is not as wide as the projector expects.
        """
        if self.vision_width not in (None, vision.hidden_size):
            raise UserError(
                f"{owner}: config.json expects image features of width {self.vision_width}, but "
                f"the vision tower has {vision.hidden_size}; give as "
                f"model.vision_tower a copy of {self.vision_tower}"
            )
        return LlavaArchitecture(
            vision_config=vision,
            text_config=self.text,
            # Beyond the vocabulary where it has no such token: see `PlaceholderEmbedding`.
            image_token_index=(
                self.text.vocab_size if self.image_token_id is None else self.image_token_id
            ),
            image_seq_length=(vision.image_size // vision.patch_size) ** 2 + self.class_token,
            vision_feature_layer=self.vision_layer,
            vision_feature_select_strategy="full" if self.class_token else "default",
            projector_type=self.projector_type,
            projector_hidden_act=self.projector_act,
            multimodal_projector_bias=self.projector_bias,
            tie_word_embeddings=bool(self.text.tie_word_embeddings),
        )


class _Facts:
    """config.json, with an error that names what it lacks."""

    def __init__(self, content: Mapping[str, Any], owner: str) -> None:
        self._content = content
        self._owner = owner

    def need(self, key: str) -> Any:
        if self._content.get(key) is None:
            raise UserError(f"{self._owner}: config.json lacks {key}, which its family needs")
        return self._content[key]

    def get(self, key: str, default: Any) -> Any:
        value = self._content.get(key)
        return default if value is None else value

    def refuse_unless(self, key: str, value: Any, accepted: tuple[Any, ...]) -> Any:
        if value not in accepted:
            raise UserError(
                f"{self._owner}: config.json has {key} {value!r}; accepted are "
                f"{', '.join(map(repr, accepted))}"
            )
        return value


def read_config(folder: Path, owner: str) -> dict[str, Any]:
    """Reads config.json.

    Raises:
        UserError: if it is missing or no JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{owner}: {file} is missing; a checkpoint folder holds one")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{owner}: {file} is no JSON: {error}; download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{owner}: {file} is no JSON object; download it again")
    return content


def read_blueprint(content: Mapping[str, Any], owner: str) -> Blueprint:
    """Reads what config.json says, whichever family wrote it.

    Raises:
        UserError: for an architecture that is not among the families, or a fact that is missing or
            not supported.
    """
    try:
        return _read(content, _Facts(content, owner), owner)
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{owner}: config.json does not describe a model: {reason}") from error


def _read(content: Mapping[str, Any], facts: _Facts, owner: str) -> Blueprint:
    kind = (content.get("architectures") or [content.get("model_type")])[0]
    if "text_config" in content and "vision_config" in content:
        return _hub(content, facts)
    if kind in ("LlavaLlamaForCausalLM", "llava", "llava_llama"):
        return _llava(facts)
    for name, language in _MOE_LLAVA.items():
        model = f"MoELLaVA{name}ForCausalLM"
        if kind in (model, f"Eval{model}", f"moe_llava_{name.lower()}"):
            return _moe_llava(facts, language)
    raise UserError(
        f"{owner}: config.json has the unknown architecture {kind}; accepted are "
        f"LlavaLlamaForCausalLM, {', '.join(f'MoELLaVA{name}ForCausalLM' for name in _MOE_LLAVA)} "
        "and LlavaForConditionalGeneration"
    )


def _llava(facts: _Facts) -> Blueprint:
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
        **_ends(facts),
    )
    return Blueprint(
        text,
        vision_tower=facts.need("mm_vision_tower"),
        projector_type=_projector(facts, "mm_projector_type"),
        **_images(facts),
    )


def _moe_llava(facts: _Facts, language: Callable[..., PretrainedConfig]) -> Blueprint:
    """Any MoE-LLaVA.

    Args:
        language: reads the facts of its language model, given those that all have in common.
    """
    moe = _Facts(facts.need("moe"), facts._owner + ", moe")
    experts = moe.need("num_experts")
    layers = moe.need("moe_layers_idx")
    moe.refuse_unless("num_experts", experts, ([experts[0]] * len(layers),))
    moe.refuse_unless("use_residual", moe.get("use_residual", False), (False,))
    text = language(
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
        **_ends(facts),
    )
    return Blueprint(
        text,
        vision_tower=facts.need("mm_image_tower"),
        projector_type=_projector(facts, "image_projector_type"),
        **_images(facts),
    )


def _stablelm(facts: _Facts, **common: Any) -> MoeStableLmConfig:
    return MoeStableLmConfig(
        intermediate_size=facts.need("intermediate_size"),
        num_key_value_heads=facts.get("num_key_value_heads", 32),
        max_position_embeddings=facts.get("max_position_embeddings", 4096),
        layer_norm_eps=facts.get("norm_eps", 1e-5),
        use_qkv_bias=facts.get("use_qkv_bias", True),
        rope_parameters=_rope(facts.get("rope_theta", 10_000), facts.get("rope_pct", 0.25)),
        **common,
    )


def _phi(facts: _Facts, **common: Any) -> MoePhiConfig:
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


def _qwen(facts: _Facts, **common: Any) -> MoeQwenConfig:
    """The first Qwen as a Qwen2.

    Its MLP is `c_proj(w1(x) * silu(w2(x)))`, each half of `intermediate_size` wide.
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


# As the names of their architectures spell the language models.
_MOE_LLAVA: dict[str, Callable[..., PretrainedConfig]] = {
    "Stablelm": _stablelm,
    "Phi": _phi,
    "QWen": _qwen,
}


def _rope(theta: float, share: float | None = None) -> dict[str, Any]:
    """Unscaled rotary positions; `share` is the part of each head that is rotated."""
    partial = {} if share is None else {"partial_rotary_factor": share}
    return {"rope_type": "default", "rope_theta": float(theta), **partial}


def _projector(facts: _Facts, key: str) -> str:
    return facts.refuse_unless(key, facts.get(key, "linear"), ("linear", "mlp2x_gelu"))


def _ends(facts: _Facts) -> dict[str, Any]:
    return {key: facts.get(key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _images(facts: _Facts) -> dict[str, Any]:
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
        "renamings": LLAVA_NAMES,
    }


def _hub(content: Mapping[str, Any], facts: _Facts) -> Blueprint:
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
        renamings=HUB_NAMES,
    )


def vision_config(content: Mapping[str, Any]) -> CLIPVisionConfig:
    """The tower that a CLIP repository's config.json, or a part of it, describes.

    Raises:
        UserError: for a tower of another kind.
    """
    kind = content.get("model_type")
    if kind not in (None, "clip", "clip_vision_model"):
        raise UserError(f"the vision tower's config.json describes a {kind}; accepted is a CLIP")
    return CLIPVisionConfig.from_dict(dict(content.get("vision_config") or content))


def rename(name: str, renamings: Renamings) -> str:
    """What a tensor is called here."""
    for pattern, replacement in renamings:
        name = re.sub(pattern, replacement, name)
    return name


def split(place: str) -> list[str]:
    """The places that a renamed tensor fills, each with an equal share of its rows, in order.

    One place for all but Qwen's `c_attn`, which is query, key and value.
    """
    if ".qkv_proj." not in place:
        return [place]
    return [place.replace(".qkv_proj.", f".{part}_proj.") for part in "qkv"]

"""A tiny checkpoint of every family: transformers' own classes with random weights, and files as
their authors publish them. Sizes are those of the smallest model that has every part."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Glm4vImageProcessorPil,
    Glm4vMoeConfig,
    GotOcr2ImageProcessorPil,
    GptOssConfig,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMImageProcessorPil,
)

from qvlm.data.prompts import CHAT, Prompting
from qvlm.models import load_model
from qvlm.models.chat import FamilyModel
from qvlm.models.networks import network

VOCABULARY = 320
IMAGE = 300  # the id of the image token
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 256,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "initializer_range": 0.1,
}
_GRID = [[28, 56], [56, 28], [56, 56]]
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_CUT = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
_QWEN_TOWER: dict[str, Any] = {
    "depth": 3,
    "num_heads": 4,
    "patch_size": 7,
    "initializer_range": 0.1,
}
_QWEN_TEXT = {**_TEXT, "rope_parameters": _MROPE}
_QWEN3_TEXT = {**_QWEN_TEXT, "head_dim": 8}
_QWEN3_TOWER = {
    "depth": 3,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "patch_size": 8,
    "deepstack_visual_indexes": [0, 1],
    "num_position_embeddings": 16,
    "initializer_range": 0.1,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": 301, "vision_start_token_id": 302}
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}PICTURE{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_VICUNA = (
    "{% for message in messages %}{% if message.role == 'user' %}USER: {% for part in "
    "message.content %}{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% else %} ASSISTANT: {{ message.content[0].text }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
_IDEFICS = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}"
    "{% if message.content[0].type == 'image' %}:{% else %}: {% endif %}{% for part in "
    "message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_GEMMA = (
    "<bos>{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n{% for part in "
    "message.content %}{% if part.type == 'image' %}<start_of_image>{% else %}"
    "{{ part.text | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@dataclass(frozen=True)
class TinyFamily:
    """A family's configuration, image processor, chat template, and special tokens from id 300."""

    config: PretrainedConfig
    image_processor: Any
    template: str
    tokens: tuple[str, ...] = ("<image>",)
    roles: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def _clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(**_TOWER)


def _siglip(**changes: Any) -> SiglipVisionConfig:
    return SiglipVisionConfig(**_TOWER | changes)


def _qwen(config: PretrainedConfig, patch: int) -> TinyFamily:
    return TinyFamily(
        config,
        Qwen2VLImageProcessorPil(
            size={"shortest_edge": 4 * patch**2, "longest_edge": 64 * patch**2}, patch_size=patch
        ),
        _CHATML.replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>"),
        ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_end|>"),
    )


def _idefics(config: PretrainedConfig, image_processor: Any) -> TinyFamily:
    tokens = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    parts = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
    return TinyFamily(
        config, image_processor, _IDEFICS, tokens + parts, settings={"image_seq_len": 4}
    )


_SQUARE = {"height": 28, "width": 28}
_PATCHES = {
    "patch_size": 7,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}


def _llava() -> TinyFamily:
    config = LlavaConfig(
        vision_config=_clip(), text_config=LlamaConfig(**_TEXT), image_token_index=IMAGE
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=_SQUARE)
    return TinyFamily(config, images, _VICUNA, settings=_PATCHES)


def _llava_next() -> TinyFamily:
    config = LlavaNextConfig(
        vision_config=_clip(),
        text_config=LlamaConfig(**_TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=_GRID,
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size=_SQUARE, image_grid_pinpoints=_GRID
    )
    return TinyFamily(config, images, _VICUNA, settings=_PATCHES)


def _llava_onevision() -> TinyFamily:
    config = LlavaOnevisionConfig(
        vision_config=_siglip(),
        text_config=Qwen2Config(**_TEXT),
        image_token_index=IMAGE,
        video_token_index=301,
        image_grid_pinpoints=_GRID,
    )
    return TinyFamily(
        config,
        LlavaOnevisionImageProcessorPil(size=_SQUARE, image_grid_pinpoints=_GRID),
        _CHATML.replace("PICTURE", "<image>\n"),
        ("<image>", "<video>", "<|im_end|>"),
        settings={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    )


def _qwen2_vl() -> TinyFamily:
    tower = {**_QWEN_TOWER, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    return _qwen(Qwen2VLConfig(text_config=_QWEN_TEXT, vision_config=tower, **_QWEN_IDS), 7)


def _qwen2_5_vl() -> TinyFamily:
    sizes = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64}
    tower = {**_QWEN_TOWER, **sizes, "window_size": 28, "fullatt_block_indexes": [1]}
    return _qwen(Qwen2_5_VLConfig(text_config=_QWEN_TEXT, vision_config=tower, **_QWEN_IDS), 7)


def _qwen3_vl() -> TinyFamily:
    parts = {"text_config": _QWEN3_TEXT, "vision_config": _QWEN3_TOWER}
    return _qwen(Qwen3VLConfig(**parts, **_QWEN_IDS), 8)


def _qwen3_vl_moe() -> TinyFamily:
    parts = {"text_config": {**_QWEN3_TEXT, **_EXPERTS}, "vision_config": _QWEN3_TOWER}
    return _qwen(Qwen3VLMoeConfig(**parts, **_QWEN_IDS), 8)


def _internvl(text: PretrainedConfig | None = None) -> TinyFamily:
    text = text or Qwen2Config(**_TEXT)
    sizes = {"image_size": [28, 28], "patch_size": [7, 7], "use_qk_norm": True}
    config = InternVLConfig(
        vision_config={**_TOWER, **sizes}, text_config=text, image_token_id=IMAGE
    )
    return TinyFamily(
        config,
        GotOcr2ImageProcessorPil(size=_SQUARE, crop_to_patches=True, min_patches=1, max_patches=4),
        _CHATML.replace("PICTURE", "<IMG_CONTEXT>\n"),
        ("<IMG_CONTEXT>", "<img>", "</img>", "<video>", "<|im_end|>"),
        roles={
            **{"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>"},
            **{"end_image_token": "</img>", "video_token": "<video>"},
        },
        settings={"image_seq_length": 4},
    )


def _internvl_gpt_oss() -> TinyFamily:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    layers = {
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return _internvl(GptOssConfig(**{**_TEXT, **experts, **layers}))


def _glm4v_moe() -> TinyFamily:
    text = {
        **_QWEN_TEXT,
        **{"moe_intermediate_size": 32, "num_experts_per_tok": 2, "n_routed_experts": 4},
        **{"n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 16},
    }
    tower = {
        **_QWEN_TOWER,
        **{"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "image_size": 56},
    }
    ids = {"image_start_token_id": 302, "image_end_token_id": 303}
    ids |= {"video_start_token_id": 304, "video_end_token_id": 305}
    config = Glm4vMoeConfig(
        text_config=text, vision_config=tower, image_token_id=IMAGE, video_token_id=301, **ids
    )
    return TinyFamily(
        config,
        Glm4vImageProcessorPil(size={"shortest_edge": 392, "longest_edge": 6272}, patch_size=7),
        _CHATML.replace("PICTURE", "<|begin_of_image|><|image|><|end_of_image|>"),
        (
            *("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>"),
            *("<|begin_of_video|>", "<|end_of_video|>", "<|im_end|>"),
        ),
    )


def _smolvlm() -> TinyFamily:
    parts = {"vision_config": {**_TOWER}, "text_config": LlamaConfig(**_TEXT)}
    return _idefics(SmolVLMConfig(**parts, image_token_id=IMAGE), SmolVLMImageProcessorPil(**_CUT))


def _idefics3() -> TinyFamily:
    parts = {"vision_config": {**_TOWER}, "text_config": LlamaConfig(**_TEXT)}
    images = Idefics3ImageProcessorPil(**_CUT)
    return _idefics(Idefics3Config(**parts, image_token_id=IMAGE), images)


def _gemma3() -> TinyFamily:
    text = {
        **_TEXT,
        **{"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8},
        "layer_types": ["sliding_attention", "full_attention"],
    }
    config = Gemma3Config(
        text_config=text,
        vision_config=_siglip(),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=301,
        eoi_token_index=302,
    )
    return TinyFamily(
        config,
        Gemma3ImageProcessorPil(size=_SQUARE),
        _GEMMA,
        ("<image_soft_token>", "<start_of_image>", "<end_of_image>", "<end_of_turn>"),
        roles={
            **{"image_token": "<image_soft_token>", "boi_token": "<start_of_image>"},
            "eoi_token": "<end_of_image>",
        },
        settings={"image_seq_length": 4},
    )


_TINY = (
    *(_llava, _llava_next, _llava_onevision, _qwen2_vl, _qwen2_5_vl, _qwen3_vl, _qwen3_vl_moe),
    *(_internvl, _internvl_gpt_oss, _smolvlm, _idefics3, _gemma3, _glm4v_moe),
)
TINY = tuple(make.__name__.removeprefix("_") for make in _TINY)


def tiny_family(name: str) -> TinyFamily:
    """The tiny model of the family with this model_type."""
    return next(make() for make in _TINY if make.__name__ == f"_{name}")


def tiny_tokenizer(family: TinyFamily) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with the special tokens of a family."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    rest = [f"<unused_{index}>" for index in range(IMAGE - 259)]
    backend.add_special_tokens(["<pad>", "<bos>", "</s>", *rest, *family.tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="</s>",
        extra_special_tokens=family.roles,
    )


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """The network of a family in evaluation mode, with random weights, norms and biases too."""
    torch.manual_seed(seed)
    config = tiny_family(name).config
    model = network(config)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not bool(parameter.any()):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


Folders = Callable[[str], Path]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A function from a family's model_type to the folder of its tiny checkpoint."""

    @cache
    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        write_family(folder, name)
        return folder

    return write


Loaded = Callable[[str], FamilyModel]


@pytest.fixture(scope="session")
def tiny(folder_of: Folders) -> Loaded:
    """A function from a family's model_type to its tiny checkpoint, loaded anew each time."""

    @cache
    def load(name: str) -> FamilyModel:
        return load_tiny(folder_of(name))

    def fresh(name: str) -> FamilyModel:
        return replace(load(name), model=copy.deepcopy(load(name).model))

    return fresh


def write_family(folder: Path, name: str) -> PreTrainedModel:
    """Writes a checkpoint folder as the hub has it, and returns the model in it."""
    family = tiny_family(name)
    model = tiny_model(name)
    model.save_pretrained(folder)
    write_encoding(folder, family)
    return model


def write_encoding(folder: Path, family: TinyFamily) -> None:
    """Writes tokenizer, image processor and chat template of a family into a checkpoint folder."""
    tiny_tokenizer(family).save_pretrained(folder)
    family.image_processor.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(family.settings))
    (folder / "chat_template.jinja").write_text(family.template)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of random squares."""
    random = torch.Generator().manual_seed(seed)
    squares = torch.randint(0, 256, (4, 4, 3), generator=random, dtype=torch.uint8)
    return Image.fromarray(squares.numpy()).resize((width, height), Image.Resampling.NEAREST)


def problems() -> list[dict[str, Any]]:
    """Problems in ScienceQA's schema, with pictures of several shapes, and one without."""
    shapes = [(28, 28), (56, 28), (28, 56), None]
    return [
        {
            "question": f"Which is number {index}?",
            "choices": ["this", "that"],
            "answer": index % 2,
            "hint": "",
            "lecture": "",
            "solution": "",
            "image": None if shape is None else picture(*shape, seed=index),
        }
        for index, shape in enumerate(shapes)
    ]


def load_tiny(folder: Path) -> FamilyModel:
    """Loads a folder of `write_family`, or a packed one of such a model."""
    loaded = load_model(folder, "hf", Prompting("CQM-A", CHAT))
    assert isinstance(loaded, FamilyModel)
    return loaded

"""A tiny checkpoint of every family: transformers' own classes with random weights, and files as
their authors publish them. Sizes are those of the smallest model that has every part."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
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
    GotOcr2ImageProcessorPil,
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
    SiglipImageProcessorPil,
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
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
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


def tiny_family(name: str) -> TinyFamily:
    """The tiny model of the family with this model_type."""
    square = {"height": 28, "width": 28}
    grid = {"size": {"shortest_edge": 28}, "crop_size": square, "image_grid_pinpoints": _GRID}
    patches = {"patch_size": 7, "vision_feature_select_strategy": "default"}
    qwen_tower = {"depth": 3, "num_heads": 4, "patch_size": 7, "initializer_range": 0.1}
    cut = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
    match name:
        case "llava":
            return TinyFamily(
                LlavaConfig(
                    vision_config=_clip(), text_config=LlamaConfig(**_TEXT), image_token_index=IMAGE
                ),
                CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=square),
                _VICUNA,
                settings={**patches, "num_additional_image_tokens": 1},
            )
        case "llava_next":
            return TinyFamily(
                LlavaNextConfig(
                    vision_config=_clip(),
                    text_config=LlamaConfig(**_TEXT),
                    image_token_index=IMAGE,
                    image_grid_pinpoints=_GRID,
                ),
                LlavaNextImageProcessorPil(**grid),
                _VICUNA,
                settings={**patches, "num_additional_image_tokens": 1},
            )
        case "llava_onevision":
            return TinyFamily(
                LlavaOnevisionConfig(
                    vision_config=_siglip(),
                    text_config=Qwen2Config(**_TEXT),
                    image_token_index=IMAGE,
                    video_token_index=301,
                    image_grid_pinpoints=_GRID,
                ),
                LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=_GRID),
                _CHATML.replace("PICTURE", "<image>\n"),
                ("<image>", "<video>", "<|im_end|>"),
                settings={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
            )
        case "qwen2_vl":
            tower = {**qwen_tower, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
            return _qwen(
                Qwen2VLConfig(text_config=_QWEN_TEXT, vision_config=tower, **_QWEN_IDS), patch=7
            )
        case "qwen2_5_vl":
            tower = {
                **qwen_tower,
                **{"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64},
                **{"window_size": 28, "fullatt_block_indexes": [1]},
            }
            return _qwen(
                Qwen2_5_VLConfig(text_config=_QWEN_TEXT, vision_config=tower, **_QWEN_IDS), patch=7
            )
        case "qwen3_vl":
            return _qwen(
                Qwen3VLConfig(text_config=_QWEN3_TEXT, vision_config=_QWEN3_TOWER, **_QWEN_IDS),
                patch=8,
            )
        case "qwen3_vl_moe":
            text = {**_QWEN3_TEXT, **_EXPERTS}
            return _qwen(
                Qwen3VLMoeConfig(text_config=text, vision_config=_QWEN3_TOWER, **_QWEN_IDS), patch=8
            )
        case "internvl":
            sizes = {"image_size": [28, 28], "patch_size": [7, 7]}
            return TinyFamily(
                InternVLConfig(
                    vision_config={**_TOWER, **sizes, "use_qk_norm": True},
                    text_config=Qwen2Config(**_TEXT),
                    image_token_id=IMAGE,
                ),
                GotOcr2ImageProcessorPil(
                    size=square, crop_to_patches=True, min_patches=1, max_patches=4
                ),
                _CHATML.replace("PICTURE", "<IMG_CONTEXT>\n"),
                ("<IMG_CONTEXT>", "<img>", "</img>", "<video>", "<|im_end|>"),
                roles={
                    **{"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>"},
                    **{"end_image_token": "</img>", "video_token": "<video>"},
                },
                settings={"image_seq_length": 4},
            )
        case "smolvlm":
            config: PretrainedConfig = SmolVLMConfig(
                vision_config={**_TOWER}, text_config=LlamaConfig(**_TEXT), image_token_id=IMAGE
            )
            return _idefics(config, SmolVLMImageProcessorPil(**cut))
        case "idefics3":
            config = Idefics3Config(
                vision_config={**_TOWER}, text_config=LlamaConfig(**_TEXT), image_token_id=IMAGE
            )
            return _idefics(config, Idefics3ImageProcessorPil(**cut))
        case "gemma3":
            text = {
                **_TEXT,
                **{"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8},
                "layer_types": ["sliding_attention", "full_attention"],
            }
            return TinyFamily(
                Gemma3Config(
                    text_config=text,
                    vision_config=_siglip(),
                    mm_tokens_per_image=4,
                    image_token_index=IMAGE,
                    boi_token_index=301,
                    eoi_token_index=302,
                ),
                Gemma3ImageProcessorPil(size=square),
                _GEMMA,
                ("<image_soft_token>", "<start_of_image>", "<end_of_image>", "<end_of_turn>"),
                roles={
                    **{"image_token": "<image_soft_token>", "boi_token": "<start_of_image>"},
                    "eoi_token": "<end_of_image>",
                },
                settings={"image_seq_length": 4},
            )
    raise AssertionError(name)


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
    """The network of a family with random weights, norms and biases included, in evaluation mode."""
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


def write_family(folder: Path, name: str) -> PreTrainedModel:
    """Writes a checkpoint folder as the hub has it, and returns the model in it."""
    family = tiny_family(name)
    model = tiny_model(name)
    model.save_pretrained(folder)
    tiny_tokenizer(family).save_pretrained(folder)
    family.image_processor.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(family.settings))
    (folder / "chat_template.jinja").write_text(family.template)
    return model


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

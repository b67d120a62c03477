"""Writes tiny checkpoints exactly as the authors of the real ones lay them out.

A model of ours with random weights becomes a folder with the original's config.json, tensor names,
shards and tokenizer files. The names are written out here one by one, independently of the
renamings in `qvlm.models.checkpoints.families`, so that a mistake there is not repeated here.
Weights are rounded to half precision first, as the originals are, so that nothing is lost.
"""

import base64
import itertools
import json
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from qvlm.models import (
    Llava,
    LlavaArchitecture,
    MoePhiConfig,
    MoeQwenConfig,
    MoeStableLmConfig,
)

BLANK = "\u2581"
WORDS = ("USER", "ASSISTANT", "Which", "is", "air", "rock", "Options", "Context", "Question", "The")
IMAGE_SIZES = {
    "llava": 224,
    "llava_v15": 336,
    "moe_llava": 336,
    "moe_llava_phi2": 336,
    "moe_llava_qwen": 336,
    "hub": 336,
}
FAMILIES = tuple(IMAGE_SIZES)


def pieces() -> list[tuple[str, float, int]]:
    """A sentencepiece BPE vocabulary: text, score, type; as LLaMA's, in small."""
    special = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    letters = sorted({*"".join(WORDS), *"abcdefghijklmnopqrstuvwxyz.:()'/?", BLANK})
    merged: list[str] = []
    for word in WORDS:  # each word grows by a letter at a time, after a blank
        merged += [BLANK + word[:end] for end in range(1, len(word) + 1)]
    normal = [*dict.fromkeys(merged), *letters]
    scored = [(piece, -float(rank), 1) for rank, piece in enumerate(normal)]
    return special + [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)] + scored


def byte_ranks() -> dict[bytes, int]:
    """Byte pairs by rank, as in a `.tiktoken` file."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for word in WORDS:
        for text in (word, f" {word}"):
            for end in range(2, len(text) + 1):
                ranks.setdefault(text[:end].encode(), len(ranks))
    return ranks


def merge(text: bytes, stop: int = 1) -> list[bytes]:
    """Byte pairs of a text, the lowest rank first, until none is left or `stop` parts are."""
    ranks = byte_ranks()
    parts = [bytes([byte]) for byte in text]
    while len(parts) > stop:
        joined = [ranks.get(left + right) for left, right in itertools.pairwise(parts)]
        found = [(rank, at) for at, rank in enumerate(joined) if rank is not None]
        if not found:
            break
        _, at = min(found)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


END_OF_TEXT = len(byte_ranks()) + 1  # one id is left out before it, as in StableLM-2
QWEN_END = len(byte_ranks())  # <|endoftext|>; 207 further special tokens follow
PHI_END = len(byte_ranks())
# What Phi-2 adds to CodeGen's vocabulary, longest runs first, and MoE-LLaVA to Phi-2's.
PHI_ADDED = {
    token: PHI_END + 1 + index
    for index, token in enumerate(["    ", "   ", "  ", "\t\t\t", "\t\t", "<|extra_0|>"])
}


def tiny(family: str, seed: int = 0) -> Llava:
    """A model of ours as a family has it, with random weights in half precision's values."""
    torch.manual_seed(seed)
    text: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
        "max_position_embeddings": 512,
    }
    if family == "moe_llava":
        text_config: Any = MoeStableLmConfig(
            **text,
            num_hidden_layers=4,
            num_key_value_heads=4,
            vocab_size=END_OF_TEXT + 30,  # rounded up, as StableLM's
            use_qkv_bias=True,
            moe_layers=[0, 2],
            capacity_factor=2.0,
            min_capacity=0,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.25,
            },
            bos_token_id=END_OF_TEXT,
            eos_token_id=END_OF_TEXT,
        )
    elif family == "moe_llava_phi2":
        text_config = MoePhiConfig(
            **{**text, "hidden_size": 40},  # heads of 10, of which Phi-2's 0.4 are rotated
            num_hidden_layers=4,
            num_key_value_heads=4,
            vocab_size=PHI_END + 20,  # rounded up, as Phi's
            moe_layers=[0, 2],
            capacity_factor=2.0,
            min_capacity=0,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.4,
            },
            bos_token_id=PHI_END,
            eos_token_id=PHI_END,
            pad_token_id=PHI_ADDED["<|extra_0|>"],
        )
    elif family == "moe_llava_qwen":
        text_config = MoeQwenConfig(
            **{**text, "max_position_embeddings": 4096},
            num_hidden_layers=4,
            num_key_value_heads=4,
            vocab_size=QWEN_END + 208 + 7,  # rounded up, as Qwen's
            moe_layers=[0, 2],
            capacity_factor=2.0,
            min_capacity=0,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            pad_token_id=QWEN_END + 3,
        )
    else:
        padded = 24 if family == "hub" else 0  # transformers' copies have rows to spare
        text_config = LlamaConfig(
            **text,
            num_hidden_layers=3,
            num_key_value_heads=2 if family == "llava_v15" else 4,
            vocab_size=len(pieces()) + padded,
            rms_norm_eps=1e-5 if family == "llava_v15" else 1e-6,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    side = IMAGE_SIZES[family]
    vision_config = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=side,
        patch_size=side // 4,
        projection_dim=16,
    )
    known = len(pieces()) if family == "hub" else text_config.vocab_size
    architecture = LlavaArchitecture(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=known,
        projector_type="linear" if family == "llava" else "mlp2x_gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = Llava(architecture).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # a bias or a norm: not left at zero or one
                parameter.add_(0.1 * torch.randn_like(parameter))
            parameter.copy_(parameter.half().float())
    return model


@dataclass
class StandIn:
    """A checkpoint folder, its tower's folder, and the model that it was written from."""

    folder: Path
    tower: Path | None
    model: Llava


def write(
    family: str,
    path: Path,
    *,
    shards: int = 2,
    safetensors: bool = False,
    carry_tower: bool = False,
    seed: int = 0,
) -> StandIn:
    """Writes one of `FAMILIES`.

    Args:
        path: an empty folder to be.
        shards: into how many files the weights are cut; 1 is a single file without an index.
        safetensors: instead of PyTorch's `.bin`.
        carry_tower: whether the checkpoint holds the tower's weights; transformers' always does.
    """
    model = tiny(family, seed)
    folder, tower = path / family, path / "clip"
    folder.mkdir(parents=True)
    spell: Callable[[str], str] = {
        "llava": lambda name: llava_name(name, linear=True),
        "llava_v15": llava_name,
        "moe_llava": moe_name,
        "moe_llava_phi2": moe_name,
        "moe_llava_qwen": qwen_name,
        "hub": hub_name,
    }[family]
    state = model.state_dict()
    tensors = {
        spell(name): tensor.half()
        for name, tensor in (fused(state) if family == "moe_llava_qwen" else state).items()
        if carry_tower or family == "hub" or not name.startswith("model.vision_tower.")
    }
    if family in ("llava", "llava_v15"):  # buffers that the libraries of 2023 saved as well
        frequencies = 10_000.0 ** -(torch.arange(0, 8, 2) / 8)
        for layer in range(3):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies.half()
    write_weights(folder, tensors, shards, safetensors)
    write_json(folder / "config.json", CONFIGS[family](model))
    if family == "moe_llava":
        write_tiktoken(folder / "arcade100k.tiktoken")
    elif family == "moe_llava_phi2":
        write_codegen(folder)
    elif family == "moe_llava_qwen":
        write_tiktoken(folder / "qwen.tiktoken")
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "QWenTokenizer"})
        write_json(
            folder / "generation_config.json",
            {"chat_format": "raw", "eos_token_id": QWEN_END, "pad_token_id": QWEN_END},
        )
    elif family == "hub":
        write_fast_tokenizer(folder, model.config.image_token_id)
        write_preprocessor(folder, 336)
    else:
        (folder / "tokenizer.model").write_bytes(sentencepiece_model())
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    if family == "hub":
        return StandIn(folder, None, model)
    write_tower(tower, model)
    return StandIn(folder, tower, model)


def write_json(file: Path, content: Any) -> None:
    """Writes JSON as the libraries do."""
    file.write_text(json.dumps(content, indent=2))


def write_weights(
    folder: Path, tensors: dict[str, Tensor], shards: int = 1, safetensors: bool = False
) -> None:
    """Writes tensors in one file, or in shards with an index."""
    stem, suffix = ("model", "safetensors") if safetensors else ("pytorch_model", "bin")
    names = sorted(tensors)
    placed = {}
    for shard in range(shards):
        part = {name: tensors[name].contiguous() for name in names[shard::shards]}
        file = (
            f"{stem}-{shard + 1:05}-of-{shards:05}.{suffix}" if shards > 1 else f"{stem}.{suffix}"
        )
        if safetensors:
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
        placed |= dict.fromkeys(part, file)
    if shards > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        write_json(folder / f"{stem}.{suffix}.index.json", index)


def write_tower(folder: Path, model: Llava) -> None:
    """Writes a CLIP repository as OpenAI's: with a text model, and sizes as bare numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    vision = model.config.vision_config
    inside = "model.vision_tower."
    tensors = {
        "vision_model." + name.removeprefix(inside): tensor
        for name, tensor in model.state_dict().items()
        if name.startswith(inside)
    }
    positions = len(tensors["vision_model.embeddings.position_embedding.weight"])
    tensors |= {
        "vision_model.embeddings.position_ids": torch.arange(positions)[None],
        "text_model.embeddings.token_embedding.weight": torch.randn(7, 8),
        "visual_projection.weight": torch.randn(16, 24),
        "logit_scale": torch.tensor(4.6),
    }
    write_weights(folder, tensors)
    write_json(
        folder / "config.json",
        {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": 16,
            "text_config": {"hidden_size": 8, "model_type": "clip_text_model"},
            "vision_config": {"hidden_act": "quick_gelu", **_vision_facts(vision)},
        },
    )
    write_preprocessor(folder, vision.image_size)


def _vision_facts(vision: CLIPVisionConfig) -> dict[str, Any]:
    """What a config.json says of a CLIP tower."""
    return {
        "hidden_size": vision.hidden_size,
        "image_size": vision.image_size,
        "intermediate_size": vision.intermediate_size,
        "model_type": "clip_vision_model",
        "num_attention_heads": vision.num_attention_heads,
        "num_hidden_layers": vision.num_hidden_layers,
        "patch_size": vision.patch_size,
        "projection_dim": 16,
    }


def write_preprocessor(folder: Path, side: int) -> None:
    """Writes CLIP's preprocessor_config.json as it was in 2022."""
    write_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": side,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "size": side,
        },
    )


def llava_name(name: str, linear: bool = False) -> str:
    """What LLaVA calls a tensor of ours; a projector of one layer has no number."""
    parts = name.split(".")
    if parts[:2] == ["model", "vision_tower"]:
        return ".".join(["model", "vision_tower", "vision_tower", "vision_model", *parts[2:]])
    if parts[:2] == ["model", "language_model"]:
        return ".".join(["model", *parts[2:]])
    if parts[1] == "multi_modal_projector":
        number = {"linear_1": "0", "linear_2": "2"}[parts[2]]
        return "model.mm_projector." + ("" if linear else f"{number}.") + parts[3]
    return name  # lm_head.weight


def moe_name(name: str) -> str:
    """What MoE-LLaVA and DeepSpeed call a tensor of ours."""
    parts = llava_name(name).split(".")
    if parts[1] == "vision_tower":
        return ".".join(["model", "image_tower", "image_tower", *parts[3:]])
    if parts[1] == "mm_projector":
        return ".".join(["model", "mm_projector", "image_spatial_proj", *parts[2:]])
    if "router" in parts:
        return f"model.layers.{parts[2]}.mlp.deepspeed_moe.gate.wg.weight"
    if "experts" in parts:
        expert = ".".join(["deepspeed_moe", "experts", "deepspeed_experts", *parts[5:]])
        return f"model.layers.{parts[2]}.mlp.{expert}"
    return ".".join(parts)


def fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ours with query, key and value stacked, as Qwen keeps them."""
    whole = {}
    for name, tensor in state.items():
        if ".self_attn.q_proj." in name and "language_model" in name:
            stack = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            whole[name.replace("q_proj", "c_attn")] = torch.cat(stack)
        elif "language_model" not in name or not re.search(r"\.[kv]_proj\.", name):
            whole[name] = tensor
    return whole


def qwen_name(name: str) -> str:
    """What MoE-LLaVA on Qwen calls a tensor of ours, or of `fused`."""
    if name == "lm_head.weight":
        return name
    parts = moe_name(name).split(".")
    if parts[1] in ("image_tower", "mm_projector"):
        return ".".join(["transformer", *parts[1:]])
    if parts[1] == "embed_tokens":
        return "transformer.wte.weight"
    if parts[1] == "norm":
        return "transformer.ln_f.weight"
    spelled = {
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn": "attn",
        "o_proj": "c_proj",
        "up_proj": "w1",
        "gate_proj": "w2",
        "down_proj": "c_proj",
    }
    return ".".join(["transformer", "h", *(spelled.get(part, part) for part in parts[2:])])


def hub_name(name: str) -> str:
    """What transformers called a tensor of its LLaVA before version 5."""
    parts = name.split(".")
    if parts[:2] == ["model", "vision_tower"]:
        return ".".join(["vision_tower", "vision_model", *parts[2:]])
    if parts[:2] == ["model", "language_model"]:
        return ".".join(["language_model", "model", *parts[2:]])
    if parts[:2] == ["model", "multi_modal_projector"]:
        return ".".join(parts[1:])
    return f"language_model.{name}"  # lm_head.weight


def _llava_config(model: Llava) -> dict[str, Any]:
    text, vision = model.config.text_config, model.config.vision_config
    wide = model.config.projector_type == "mlp2x_gelu"
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "image_aspect_ratio": "pad" if wide else "square",
        "image_grid_pinpoints": None,
        "initializer_range": 0.02,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_position_embeddings,
        "mm_hidden_size": vision.hidden_size,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14" + ("-336" if wide else ""),
        "model_type": "llava",
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "pad_token_id": 0,
        "rms_norm_eps": text.rms_norm_eps,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": text.vocab_size,
    }
    if wide:  # what version 1.3 did not write yet
        config |= {
            "mm_projector_type": "mlp2x_gelu",
            "num_key_value_heads": text.num_key_value_heads,
            "rope_scaling": None,
        }
    return config


def _moe_config(model: Llava) -> dict[str, Any]:
    """What every MoE-LLaVA says, whatever its language model."""
    text = model.config.text_config
    return {
        "hidden_size": text.hidden_size,
        "image_aspect_ratio": "pad",
        "image_projector_type": "mlp2x_gelu",
        "initializer_range": 0.02,
        "intermediate_size": text.intermediate_size,
        "mm_hidden_size": model.config.vision_config.hidden_size,
        "mm_image_tower": "openai/clip-vit-large-patch14-336",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_video_tower": None,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "moe": {
            "capacity_factor": 1.5,
            "ep_size": 1,
            "eval_capacity_factor": 2.0,
            "min_capacity": 0,
            "moe_enable": True,
            "moe_layers_idx": [0, 2],
            "moe_mode": "sparse",
            "num_experts": [4, 4],
            "router_aux_loss_coef": 0.01,
            "top_k_experts": 2,
            "train_modules": ["gate_proj", "up_proj", "down_proj", "wg"],
            "use_residual": False,
        },
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": text.vocab_size,
    }


def _stablelm_config(model: Llava) -> dict[str, Any]:
    text = model.config.text_config
    return _moe_config(model) | {
        "architectures": ["MoELLaVAStablelmForCausalLM"],
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        "hidden_act": "silu",
        "max_position_embeddings": text.max_position_embeddings,
        "model_type": "moe_llava_stablelm",
        "norm_eps": 1e-05,
        "num_key_value_heads": text.num_key_value_heads,
        "rope_pct": 0.25,
        "rope_theta": 10000,
        "use_qkv_bias": True,
    }


def _phi_config(model: Llava) -> dict[str, Any]:
    text = model.config.text_config
    return _moe_config(model) | {
        "architectures": ["MoELLaVAPhiForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": PHI_END,
        "embd_pdrop": 0.0,
        "eos_token_id": PHI_END,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": text.max_position_embeddings,
        "model_type": "moe_llava_phi",
        "num_key_value_heads": text.num_key_value_heads,
        "pad_token_id": PHI_ADDED["<|extra_0|>"],
        "partial_rotary_factor": 0.4,
        "qk_layernorm": False,
        "resid_pdrop": 0.1,
        "rope_scaling": None,
        "rope_theta": 10000.0,
    }


def _qwen_config(model: Llava) -> dict[str, Any]:
    text = model.config.text_config
    return _moe_config(model) | {
        "architectures": ["MoELLaVAQWenForCausalLM"],
        "attn_dropout_prob": 0.0,
        "bf16": True,
        "emb_dropout_prob": 0.0,
        "fp16": False,
        "fp32": False,
        "intermediate_size": 2 * text.intermediate_size,  # of w1 and w2 together
        "kv_channels": text.hidden_size // text.num_attention_heads,
        "layer_norm_epsilon": 1e-06,
        "max_position_embeddings": text.max_position_embeddings,
        "model_type": "moe_llava_qwen",
        "no_bias": True,
        "onnx_safe": None,
        "pad_token_id": QWEN_END + 3,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": text.max_position_embeddings,
        "softmax_in_fp32": False,
        "tokenizer_class": "QWenTokenizer",
        "use_cache_kernel": False,
        "use_cache_quantization": False,
        "use_dynamic_ntk": True,
        "use_flash_attn": False,
        "use_logn_attn": True,
    }


def _hub_config(model: Llava) -> dict[str, Any]:
    text, vision = model.config.text_config, model.config.vision_config
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": model.config.image_token_id,
        "model_type": "llava",
        "pad_token_id": len(pieces()) + 1,
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": text.max_position_embeddings,
            "model_type": "llama",
            "num_attention_heads": text.num_attention_heads,
            "num_hidden_layers": text.num_hidden_layers,
            "num_key_value_heads": text.num_key_value_heads,
            "rms_norm_eps": text.rms_norm_eps,
            "torch_dtype": "float16",
            "vocab_size": text.vocab_size,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": {**_vision_facts(vision), "vocab_size": 32000},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


CONFIGS = {
    "llava": _llava_config,
    "llava_v15": _llava_config,
    "moe_llava": _stablelm_config,
    "moe_llava_phi2": _phi_config,
    "moe_llava_qwen": _qwen_config,
    "hub": _hub_config,
}


def sentencepiece_model() -> bytes:
    """A tokenizer.model: the protocol buffer of sentencepiece, written by hand."""
    message = b""
    for piece, score, kind in pieces():
        fields = _bytes(1, piece.encode()) + b"\x15" + struct.pack("<f", score)
        message += _bytes(1, fields + (_integer(3, kind) if kind != 1 else b""))
    trainer = _bytes(2, b"bpe") + _integer(3, 2) + _integer(35, 1)
    normalizer = _bytes(1, b"identity") + _bytes(2, b"") + _integer(3, 1) + _integer(4, 0)
    return message + _bytes(2, trainer) + _bytes(3, normalizer)


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def _integer(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def write_tiktoken(file: Path) -> None:
    """Writes byte pairs and their ranks, a line for each."""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in byte_ranks().items())
    file.write_text("".join(lines))


def write_codegen(folder: Path) -> None:
    """Writes Phi-2's tokenizer as transformers saved it from Python classes, without a fast one."""
    letters, spare = {}, 256
    for byte in range(256):  # a byte that cannot be printed becomes a letter that can
        shown = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        letters[byte], spare = (chr(byte), spare) if shown else (chr(spare), spare + 1)

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [" ".join(map(spell, merge(token, 2))) for token in byte_ranks() if len(token) > 1]
    vocabulary = {spell(token): rank for token, rank in byte_ranks().items()}
    write_json(folder / "vocab.json", {**vocabulary, "<|endoftext|>": PHI_END})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    write_json(folder / "added_tokens.json", PHI_ADDED)
    ends = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    spares = {"pad_token": "<|extra_0|>", "unk_token": "<|extra_0|>"}
    write_json(folder / "special_tokens_map.json", ends | spares)
    added = {
        str(index): {
            "content": token,
            "lstrip": False,
            "normalized": not token.startswith("<"),
            "rstrip": False,
            "single_word": False,
            "special": token.startswith("<"),
        }
        for token, index in {"<|endoftext|>": PHI_END, **PHI_ADDED}.items()
    }
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            **ends,
            "clean_up_tokenization_spaces": True,
            "model_max_length": 2048,
            **spares,
            "padding_side": "right",
            "tokenizer_class": "CodeGenTokenizer",
        },
    )


def write_fast_tokenizer(folder: Path, image: int) -> None:
    """Writes a tokenizer.json as transformers' copies of LLaVA have, with `<image>` in it."""
    vocabulary = {piece: index for index, (piece, _, _) in enumerate(pieces())}
    merges = [
        (piece[:-1], piece[-1]) for piece, _, kind in pieces() if kind == 1 and len(piece) > 1
    ]
    backend = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    for token in ("<unk>", "<s>", "</s>", "<image>", "<pad>"):
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
    assert backend.token_to_id("<image>") == image
    backend.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "tokenizer_class": "LlamaTokenizer",
        },
    )


def slow_sentencepiece(text: str) -> list[int]:
    """What sentencepiece does with a text: merge the best-scored neighbors until none are left."""
    table = {
        piece: (index, score) for index, (piece, score, kind) in enumerate(pieces()) if kind == 1
    }
    bytes_at = {piece: index for index, (piece, _, kind) in enumerate(pieces()) if kind == 6}
    if not text:
        return []
    parts = list(BLANK + text.replace(" ", BLANK))
    while True:
        pairs = [table.get(left + right) for left, right in _neighbors(parts)]
        found = [(pair[1], -at) for at, pair in enumerate(pairs) if pair]
        if not found:
            break
        at = -max(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids = []
    for part in parts:
        if part in table:
            ids.append(table[part][0])
        else:
            ids += [bytes_at[f"<0x{byte:02X}>"] for byte in part.encode()]
    return ids


def _neighbors(parts: list[str]) -> Iterator[tuple[str, str]]:
    for at in range(len(parts) - 1):
        yield parts[at], parts[at + 1]

"""Quantized checkpoints in published layouts, written out bit by bit without any library.

AutoGPTQ and AutoAWQ do not install beside the PyTorch of this project. Their layouts are those of
their `pack` methods, which `words` and `AWQ_ORDER` follow.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PARTS = {
    "self_attn.q_proj": (32, 32),
    "self_attn.v_proj": (16, 32),
    "mlp.up_proj": (64, 32),
    "mlp.down_proj": (32, 64),
}
EXPERT = {"gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64)}


def words(codes: Tensor, bits: int) -> Tensor:
    """Packs rows of codes [rows, n] into int32 words, lowest bit first."""
    planes = (codes.numpy()[..., None] >> np.arange(bits)) & 1
    stream = planes.reshape(len(codes), -1).astype(np.uint8)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little").view(np.int32).copy())


def rounded(shape: tuple[int, int], bits: int, group: int, seed: int) -> tuple[Tensor, ...]:
    """A random weight: codes [out, in], zero points and scales [out, groups], and its values."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1
    groups = weight.unflatten(1, (-1, group))
    low, high = groups.amin(2, keepdim=True).clamp_max(0), groups.amax(2, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half().float()
    zero = (-low / scale).round().clamp(0, 2**bits - 1)
    codes = ((groups / scale).round() + zero).clamp(0, 2**bits - 1)
    values = ((codes - zero) * scale).flatten(1)
    return codes.flatten(1).long(), zero[..., 0].long(), scale[..., 0], values


def save(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> Path:
    """Writes tensors, embeddings, a norm and a head as a checkpoint, and returns the folder."""
    rest = {
        "model.embed_tokens.weight": torch.randn(16, 32),
        "model.layers.0.input_layernorm.weight": torch.ones(32),
        "lm_head.weight": torch.randn(16, 32),
    }
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: value.contiguous() for name, value in (rest | tensors).items()}
    save_file(whole, folder / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def layers() -> dict[str, tuple[int, int]]:
    """Names and shapes of the linears of two decoder layers."""
    return {f"model.layers.{i}.{part}": size for i in range(2) for part, size in PARTS.items()}


def write_gptq(
    folder: Path, bits: int = 4, group: int = 32, ordered: bool = False, version: int = 1
) -> tuple[Path, dict[str, Tensor]]:
    """Writes a checkpoint as AutoGPTQ does, and returns its folder and the values of its weights.

    Args:
        ordered: Whether inputs are put into groups by another order than their own.
        version: 2 stores zero points as they are, 1 less one.
    """
    tensors, values = {}, {}
    for seed, (name, shape) in enumerate(layers().items()):
        codes, zero, scale, value = rounded(shape, bits, group, seed)
        order = torch.arange(shape[1])
        if ordered:
            order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed))
        place = order.argsort()  # the place in the groups of each input
        tensors |= {
            f"{name}.qweight": words(codes[:, place], bits).T,
            f"{name}.qzeros": words((zero.T - int(version == 1)) % 2**bits, bits),
            f"{name}.scales": scale.T.half(),
            f"{name}.g_idx": (place // group).int(),
        }
        values[name] = value[:, place]
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": ordered}
    if version == 2:
        settings["checkpoint_format"] = "gptq_v2"
    return save(folder, tensors, settings), values


def write_awq(folder: Path, group: int = 32) -> tuple[Path, dict[str, Tensor]]:
    """Writes a checkpoint as AutoAWQ does, and returns its folder and the values of its weights."""
    tensors, values = {}, {}
    for seed, (name, shape) in enumerate(layers().items()):
        codes, zero, scale, values[name] = rounded(shape, 4, group, seed)
        tensors |= {
            f"{name}.qweight": words(codes.T.unflatten(1, (-1, 8))[:, :, AWQ_ORDER].flatten(1), 4),
            f"{name}.qzeros": words(zero.T.unflatten(1, (-1, 8))[:, :, AWQ_ORDER].flatten(1), 4),
            f"{name}.scales": scale.T.half(),
        }
    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    return save(folder, tensors, {**settings, "zero_point": True}), values


def packed_layer(name: str, shape: tuple[int, int], seed: int, bits: int = 4) -> dict[str, Tensor]:
    """The tensors of one layer of compressed-tensors, in groups of 32."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1
    groups = weight.unflatten(1, (-1, 32))
    scale = groups.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 0.5)
    codes = (groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).flatten(1)
    return {
        f"{name}.weight_packed": words(codes.long() + 2 ** (bits - 1), bits),
        f"{name}.weight_scale": scale[..., 0],
        f"{name}.weight_shape": torch.tensor(shape),
    }


def packed_settings(bits: int = 4, ignore: tuple[str, ...] = ("lm_head",)) -> dict[str, Any]:
    """The `quantization_config` that belongs to `packed_layer`."""
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": list(ignore),
    }


def write_mixture(folder: Path, experts: int = 4, ignore: tuple[str, ...] = ()) -> Path:
    """Writes a mixture in the format of compressed-tensors, whose router is float."""
    tensors: dict[str, Tensor] = {}
    for index in range(2):
        block = f"model.layers.{index}"
        tensors |= packed_layer(f"{block}.self_attn.q_proj", (32, 32), 100 + index)
        tensors[f"{block}.mlp.gate.weight"] = torch.randn(experts, 32)
        for expert in range(experts):
            for part, shape in EXPERT.items():
                name = f"{block}.mlp.experts.{expert}.{part}"
                seed = 1000 * index + 10 * expert + len(part) + (part == "gate_proj")
                tensors |= packed_layer(name, shape, seed)
    skipped = ("lm_head", "re:.*mlp\\.gate$", *ignore)
    return save(folder, tensors, packed_settings(ignore=skipped))


def edit(folder: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Replaces tensors of a checkpoint by name; None deletes one. Its header is kept."""
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    tensors = {**load_file(file), **changes}
    kept = {name: value.contiguous() for name, value in tensors.items() if value is not None}
    save_file(kept, file, header)


def write_gguf(file: Path, tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]]) -> Path:
    """Writes a GGUF file of version 3 without keys.

    Args:
        tensors: Type, shape with the fastest dimension last, and bytes of each tensor, by name.
    """
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), 0)
    data = b""
    for name, (kind, shape, content) in tensors.items():
        text = name.encode()
        header += struct.pack("<Q", len(text)) + text + struct.pack("<I", len(shape))
        header += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        header += struct.pack("<IQ", kind, len(data))
        data += content + bytes(-len(content) % 32)
    file.write_bytes(header + bytes(-len(header) % 32) + data)
    return file


def q8_0(shape: tuple[int, ...], seed: int) -> tuple[int, tuple[int, ...], bytes]:
    """A random weight of GGUF's type Q8_0: blocks of a float16 scale and 32 signed bytes."""
    weight = np.random.default_rng(seed).normal(size=(math.prod(shape) // 32, 32))
    scale = (np.abs(weight).max(1, keepdims=True) / 127).astype(np.float16)
    codes = np.rint(weight / scale.astype(np.float64)).clip(-127, 127).astype(np.int8)
    blocks = np.concatenate([scale.view(np.uint8), codes.view(np.uint8)], axis=1)
    return 8, shape, blocks.tobytes()

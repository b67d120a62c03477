"""Makes the quantized checkpoints of this folder, each with the library of its own format.

    python tests/quantized/make.py

needs bitsandbytes, compressed-tensors, gguf and torchao; README.md says which versions were used.
Every checkpoint is of one LLaMA of two layers with random weights. `expected.safetensors` holds
what each library itself dequantizes one layer to.
"""

import shutil
from pathlib import Path

import gguf
import numpy as np
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import save_file
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

HERE = Path(__file__).parent
LAYER = "model.layers.1.mlp.down_proj"
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tiny(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.1,
        dtype=dtype,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def compressed_tensors(folder: Path, act: dict | None = None, **weights: object) -> Tensor:
    """Saves a model with absmax scales; returns what the library dequantizes `LAYER` to."""
    model = tiny()
    group: dict = {"targets": ["Linear"], "weights": weights}
    if act:
        group["input_activations"] = act
    scheme = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"])
    apply_quantization_config(model, scheme)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            _set_scale(module, weights)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    compressor.decompress_model(model)
    return model.get_submodule(LAYER).weight.detach().float()


def _set_scale(module: nn.Module, weights: dict) -> None:
    grouped = (
        module.weight.detach().unflatten(1, (-1, weights.get("group_size") or 10**9))
        if weights.get("group_size")
        else module.weight.detach()[:, None]
    )
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if weights.get("type") == "float":
        scale, zero = grouped.abs().amax(-1) / 448, None
    elif weights["symmetric"]:
        scale, zero = grouped.abs().amax(-1) / (2 ** weights["num_bits"] - 1) * 2, None
    else:
        scale = (high - low) / (2 ** weights["num_bits"] - 1)
        zero = (-low / scale).round() - 2 ** (weights["num_bits"] - 1)
    module.weight_scale.data.copy_(scale)
    if zero is not None:
        module.weight_zero_point.data.copy_(zero.to(torch.int8))


def bitsandbytes(folder: Path, **options: object) -> Tensor:
    tiny().save_pretrained(HERE / "float")
    config = BitsAndBytesConfig(**options)
    model = AutoModelForCausalLM.from_pretrained(
        HERE / "float", quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    shutil.rmtree(HERE / "float")
    weight = model.get_submodule(LAYER).weight
    if options.get("load_in_8bit"):
        state = weight.SCB if weight.SCB is not None else model.get_submodule(LAYER).state.SCB
        return weight.data.float() * state[:, None] / 127
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).float()


def torchao(folder: Path, config: object) -> Tensor:
    tiny().save_pretrained(HERE / "float")
    model = AutoModelForCausalLM.from_pretrained(
        HERE / "float",
        quantization_config=TorchAoConfig(quant_type=config),
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    model.save_pretrained(folder)
    shutil.rmtree(HERE / "float")
    return model.get_submodule(LAYER).weight.dequantize().float()


def gguf_file(file: Path, kind: gguf.GGMLQuantizationType, file_type: gguf.LlamaFileType) -> Tensor:
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_file_type(file_type)
    writer.add_block_count(2)
    for name, tensor in tiny().state_dict().items():
        stem = name.removesuffix(".weight")
        renamed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}.get(stem)
        if stem == "lm_head":
            renamed = "output"
        if renamed is None:
            _, _, layer, part = stem.split(".", 3)
            renamed = f"blk.{layer}.{GGUF_NAMES[part]}"
        data = tensor.numpy()
        quantized = data.ndim == 2 and renamed.startswith("blk")
        stored = gguf.quants.quantize(data, kind) if quantized else data
        writer.add_tensor(f"{renamed}.weight", stored, raw_dtype=kind if quantized else None)
        if stem == LAYER:
            expected = torch.from_numpy(gguf.quants.dequantize(stored, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def gguf_blocks() -> dict[str, Tensor]:
    """Random blocks of types that gguf reads but cannot write, and what it reads."""
    random, found = np.random.default_rng(0), {}
    for name in ("Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"):
        kind = gguf.GGMLQuantizationType[name]
        size = gguf.GGML_QUANT_SIZES[kind][1]
        blocks = random.integers(0, 256, (3, size), dtype=np.uint8)
        places = {"Q3_K": [size - 2], "Q6_K": [size - 2], "Q2_K": [size - 4, size - 2]}
        halves = places.get(name, [0, 2] if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else [0])
        for place in halves:  # a random half may be NaN
            half = random.uniform(0.01, 0.1, (3, 1)).astype(np.float16)
            blocks[:, place : place + 2] = half.view(np.uint8)
        found[f"{name}.blocks"] = torch.from_numpy(blocks)
        found[f"{name}.values"] = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
    return found


def main() -> None:
    for old in HERE.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
    group = {"type": "int", "strategy": "group", "group_size": 32}
    int8 = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    fp8 = {**int8, "type": "float"}
    channel = {"num_bits": 8, "strategy": "channel", "symmetric": True}
    kinds, files = gguf.GGMLQuantizationType, gguf.LlamaFileType
    expected = {
        "ct_w4": compressed_tensors(HERE / "ct_w4", num_bits=4, symmetric=True, **group),
        "ct_w4_asym": compressed_tensors(HERE / "ct_w4_asym", num_bits=4, symmetric=False, **group),
        "ct_w3": compressed_tensors(HERE / "ct_w3", num_bits=3, symmetric=True, **group),
        "ct_w8a8": compressed_tensors(HERE / "ct_w8a8", int8, type="int", **channel),
        "ct_fp8": compressed_tensors(HERE / "ct_fp8", fp8, type="float", **channel),
        "bnb_nf4": bitsandbytes(
            HERE / "bnb_nf4",
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
        ),
        "bnb_fp4": bitsandbytes(HERE / "bnb_fp4", load_in_4bit=True, bnb_4bit_quant_type="fp4"),
        "bnb_int8": bitsandbytes(HERE / "bnb_int8", load_in_8bit=True),
        "torchao_int8": torchao(HERE / "torchao_int8", Int8WeightOnlyConfig(version=2)),
        "torchao_int4": torchao(
            HERE / "torchao_int4",
            IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32), version=2),
        ),
        "gguf_q4_0": gguf_file(HERE / "q4_0.gguf", kinds.Q4_0, files.MOSTLY_Q4_0),
        "gguf_q8_0": gguf_file(HERE / "q8_0.gguf", kinds.Q8_0, files.MOSTLY_Q8_0),
    }
    blocks = gguf_blocks()
    whole = {name: value.contiguous() for name, value in (expected | blocks).items()}
    save_file(whole, HERE / "expected.safetensors")
    for unused in HERE.glob("*/generation_config.json"):
        unused.unlink()
    for file in HERE.rglob("*.safetensors"):
        file.chmod(0o644)


if __name__ == "__main__":
    main()

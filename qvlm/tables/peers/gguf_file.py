"""Writes a LLaMA as a GGUF file, as llama.cpp reads it."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import LlamaForCausalLM

# Names in transformers and in llama.cpp, relative to a decoder layer.
LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
ROTATED = ("self_attn.q_proj", "self_attn.k_proj")


def write_gguf(path: Path, model: LlamaForCausalLM, layers: int, kind: str) -> int:
    """Writes a model whose decoder layers are copies of the first one, without a tokenizer.

    Args:
        path: File to write.
        model: Model in any floating-point type.
        layers: Number of decoder layers in the file.
        kind: Type of the matrices in the file, such as "Q4_0".

    Returns:
        Bytes of the linears of one decoder layer.
    """
    import gguf

    quantized = gguf.GGMLQuantizationType[kind]
    first: Any = model.model.layers[0]
    linears: dict[str, np.ndarray] = {}
    for name, own in LINEARS.items():
        weight = _as_rotated(name, first.get_submodule(name).weight, model.config.head_dim)
        linears[own] = gguf.quantize(weight, quantized)
    writer = gguf.GGUFWriter(path, "llama")
    _write_sizes(writer, model, layers)
    vocabulary = gguf.quantize(_numpy(model.get_input_embeddings().weight), quantized)
    writer.add_tensor("token_embd.weight", vocabulary, raw_dtype=quantized)
    writer.add_tensor("output.weight", vocabulary, raw_dtype=quantized)
    writer.add_tensor("output_norm.weight", _numpy(model.model.norm.weight))
    for index in range(layers):
        for name, own in NORMS.items():
            norm = _numpy(first.get_submodule(name).weight)
            writer.add_tensor(f"blk.{index}.{own}.weight", norm)
        for own, codes in linears.items():
            writer.add_tensor(f"blk.{index}.{own}.weight", codes, raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sum(codes.nbytes for codes in linears.values())


def _write_sizes(writer: Any, model: LlamaForCausalLM, layers: int) -> None:
    config = model.config
    writer.add_block_count(layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def _as_rotated(name: str, weight: Tensor, head_dim: int) -> np.ndarray:
    """Returns a weight in float32 whose outputs have llama.cpp's order.

    llama.cpp rotates neighboring channels of a head, and transformers those half a head apart.
    """
    if name not in ROTATED:
        return _numpy(weight)
    heads = weight.unflatten(0, (-1, 2, head_dim // 2))
    return _numpy(heads.transpose(1, 2).flatten(0, 2))


def _numpy(x: Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.detach().float().numpy())

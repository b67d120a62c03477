"""A GGUF file holds the model's sizes and its weights, in the order of llama.cpp."""

from pathlib import Path

import numpy as np
import pytest

from qvlm.tables.peers.gguf_file import LINEARS, ROTATED, write_gguf
from tests.helpers import peers

gguf = pytest.importorskip("gguf")

LAYERS = 2


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4.5), ("Q8_0", 8.5)])
def test_a_file_holds_the_model(tmp_path: Path, kind: str, bits: float) -> None:
    model, path = peers.model(), tmp_path / "model.gguf"
    weights = 4 * peers.HIDDEN**2 + 3 * peers.HIDDEN * peers.WIDE
    assert write_gguf(path, model, LAYERS, kind) == weights * bits / 8
    reader = gguf.GGUFReader(path)
    sizes = {name: reader.fields[f"llama.{name}"].contents() for name in SIZES}
    assert sizes == SIZES
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 3 + LAYERS * 9
    for index in range(LAYERS):
        for name, own in LINEARS.items():
            tensor = tensors[f"blk.{index}.{own}.weight"]
            assert tensor.tensor_type.name == kind
            weight = model.model.layers[0].get_submodule(name).weight.float().numpy()
            if name in ROTATED:
                weight = interleaved(weight)
            held = gguf.dequantize(tensor.data, tensor.tensor_type)
            assert np.linalg.norm(held - weight) < 0.12 * np.linalg.norm(weight)
        norm = model.model.layers[0].post_attention_layernorm.weight.float().numpy()
        assert np.array_equal(tensors[f"blk.{index}.ffn_norm.weight"].data, norm)


SIZES = {
    "block_count": LAYERS,
    "embedding_length": peers.HIDDEN,
    "feed_forward_length": peers.WIDE,
    "attention.head_count": 2,
    "vocab_size": 32,
}


def interleaved(weight: np.ndarray) -> np.ndarray:
    """The outputs of each head of 64, those of the first half and of the second one in turn."""
    order = [64 * head + 32 * half + at for head in (0, 1) for at in range(32) for half in (0, 1)]
    return weight[order]

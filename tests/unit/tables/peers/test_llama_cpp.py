"""llama.cpp computes the same as transformers, with the weights that the file holds."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from qvlm.tables.peers.llama_cpp import Q4_0, Q8_0, LlamaCpp
from tests.helpers import peers

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

INT8 = 0.05  # relative difference where inputs are rounded to 8 bits and caches to 16
LAYERS = 3


def dequantized(kind: str, weight: Tensor) -> Tensor:
    stored = gguf.GGMLQuantizationType[kind]
    codes = gguf.quantize(np.ascontiguousarray(weight.detach().float().numpy()), stored)
    return torch.from_numpy(gguf.dequantize(codes, stored))


@pytest.mark.parametrize("peer", [Q4_0, Q8_0], ids=lambda peer: peer.name)
def test_a_model_computes_with_its_weights(peer: LlamaCpp) -> None:
    model, x = peers.model(), peers.inputs(6)[peers.HIDDEN]
    loaded = peer.load(model, LAYERS)
    assert loaded.model is not None and loaded.layer is None
    expected = peers.hidden_states(model, partial(dequantized, peer.kind), x, LAYERS)
    for _ in range(2):  # every start begins a sequence of its own
        step = loaded.model()
        y = torch.cat([step(part) for part in x.split([4, 1, 1])])
        assert peers.difference(y, expected) < INT8
    weights = 4 * peers.HIDDEN**2 + 3 * peers.HIDDEN * peers.WIDE
    assert loaded.weight_bytes == weights * (peer.bits + 0.5) / 8

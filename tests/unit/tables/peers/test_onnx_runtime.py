"""ONNX Runtime's MatMulNBits multiplies with the weights that it was given."""

import pytest
import torch
from torch import Tensor

from qvlm.tables.peers.base import rounded
from qvlm.tables.peers.onnx_runtime import GROUP_SIZE, MATMUL_NBITS
from tests.helpers import peers

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

INT8 = 0.02  # relative difference of sums whose inputs are rounded to 8 bits


def dequantized(weight: Tensor) -> Tensor:
    codes, scale = rounded(weight, GROUP_SIZE)
    groups = codes.float().unflatten(1, (-1, GROUP_SIZE)) - 8
    return (groups * scale.unsqueeze(2)).flatten(1)


@pytest.mark.parametrize("rows", [1, 7])
def test_a_layer_computes_with_its_weights(rows: int) -> None:
    model, x = peers.model(), peers.inputs(rows)
    loaded = MATMUL_NBITS.load(model, 1)
    assert loaded.layer is not None and loaded.model is None
    found = loaded.layer()(x)
    for y, expected in zip(found, peers.products(model, dequantized, x), strict=True):
        assert peers.difference(y, expected) < INT8
    weights = 4 * peers.HIDDEN**2 + 3 * peers.HIDDEN * peers.WIDE
    assert loaded.weight_bytes == weights // 2 + 4 * weights // GROUP_SIZE
    assert all(y.dtype == torch.float32 for y in found)

"""Each format is read as its own library reads it: see tests/quantized/README.md."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qvlm.proving.checkpoint import open_checkpoint
from qvlm.proving.formats.gguf_types import KINDS
from qvlm.proving.proof import prove
from tests.helpers.stored import dequantized

MADE = Path(__file__).parents[2] / "quantized"
EXPECTED = load_file(MADE / "expected.safetensors")
# Name in EXPECTED, file or folder, layer, bits, and weights that share a scale.
CHECKPOINTS = {
    "ct_w4": ("ct_w4", 4, 32),
    "ct_w4_asym": ("ct_w4_asym", 4, 32),
    "ct_w3": ("ct_w3", 3, 32),
    "ct_w8a8": ("ct_w8a8", 8, 64),
    "ct_fp8": ("ct_fp8", 8, 64),
    "bnb_nf4": ("bnb_nf4", 4, 64),
    "bnb_fp4": ("bnb_fp4", 4, 64),
    "bnb_int8": ("bnb_int8", 8, 64),
    "torchao_int8": ("torchao_int8", 8, 64),
    "torchao_int4": ("torchao_int4", 4, 32),
    "gguf_q4_0": ("q4_0.gguf", 4, 32),
    "gguf_q8_0": ("q8_0.gguf", 8, 32),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_codes_and_scales_are_those_of_the_library(name: str) -> None:
    place, bits, sharing = CHECKPOINTS[name]
    layer = "blk.1.ffn_down" if place.endswith("gguf") else "model.layers.1.mlp.down_proj"
    weight = open_checkpoint(MADE / place).read(layer)
    found, expected = dequantized(weight), EXPECTED[name]
    assert weight.claimed_bits == bits
    assert weight.codes.shape[1] == sharing
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_a_library_made_is_proven(name: str) -> None:
    proof = prove(MADE / CHECKPOINTS[name][0])
    assert proof.found == []
    assert proof.holds
    assert len(proof.layers) == 14
    assert {layer.bits for layer in proof.layers} == {CHECKPOINTS[name][1]}
    assert sum(layer.count for layer in proof.layers) == 18432
    assert sum(part.count for part in proof.floats) == 16 * 32 * 2 + 5 * 32  # tables and norms
    assert proof.float_share == pytest.approx(1184 / (1184 + 18432))


@pytest.mark.parametrize("name", [name[:-7] for name in EXPECTED if name.endswith(".blocks")])
def test_blocks_of_gguf_are_read_as_by_its_library(name: str) -> None:
    (kind,) = (kind for kind in KINDS.values() if kind.name == name)
    found = kind.read(EXPECTED[f"{name}.blocks"])
    steps = found.codes.float() - found.zero
    if found.levels is not None:
        steps = found.levels[found.codes.long()]
    values = steps * found.scale[:, None]
    if found.minimum is not None:
        values = values - found.minimum[:, None]
    expected = EXPECTED[f"{name}.values"]
    torch.testing.assert_close(values.view(expected.shape), expected, rtol=1e-6, atol=1e-7)
    assert int(found.codes.max()) < 2**kind.bits

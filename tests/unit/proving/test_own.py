"""Packed checkpoints of qvlm, sound and sabotaged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qvlm.packing.checkpoint import save_packed
from qvlm.packing.formats import pack, unpack
from qvlm.packing.model import pack_model, packed_layers
from qvlm.proving.checkpoint import open_checkpoint
from qvlm.proving.proof import prove
from tests.helpers.foreign import edit
from tests.helpers.layers import rounded
from tests.helpers.stored import rows_of_values

LAYER = "model.language_model.layers.1.mlp.down_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = rounded()
    pack_model(model)
    save_packed(model, tmp_path)
    return tmp_path


def configure(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"]["layers"])
    (folder / "config.json").write_text(json.dumps(config))


def test_a_packed_model_is_proven(folder: Path) -> None:
    proof = prove(folder)
    assert proof.found == []
    assert len(proof.layers) == 3 * 6 + 2 + 2 * 7
    assert proof.claim == "W4A4"
    assert proof.inputs == []  # it has no qvlm.json, so that it is not loaded


def test_codes_and_scales_are_those_of_the_layer(folder: Path) -> None:
    model = rounded()
    pack_model(model)
    for name, layer in packed_layers(model).items():
        found = rows_of_values(open_checkpoint(folder).read(name))
        stored = layer.dequantized()[:, layer.channels().long()]
        assert torch.equal(found.flatten(), stored.flatten()), name


def float_bits(value: float) -> Tensor:
    return torch.tensor(value).view(torch.int32)


def with_first(tensor: Tensor, value: Tensor) -> Tensor:
    copy = tensor.clone()
    copy.view(-1)[0] = value
    return copy


def few_codes(codes: Tensor) -> Tensor:
    return pack(unpack(codes, 4, 64) // 4 * 4, 4)


CHANGES: dict[str, tuple[str, Callable[[Tensor], Tensor | None], str]] = {
    "no scales": ("scale", lambda x: None, "its tensor scale is missing"),
    "NaN scale": ("scale", lambda x: with_first(x, float_bits(torch.nan)), "are not a number"),
    "zero scale": (
        "scale",
        lambda x: with_first(x, float_bits(0.0)),
        "zero, although the codes differ",
    ),
    "short codes": ("codes", lambda x: x[:, :-1], "its codes is torch.uint8 of shape 32 x 31"),
    "few codes": ("codes", few_codes, "its codes take 4 values, which 2 bits hold"),
    "zero point": ("zero_point", lambda x: with_first(x, torch.tensor(16)), "are out of range"),
    "input scale": (
        "input_scale",
        lambda x: with_first(x, float_bits(torch.inf)),
        "the scale of its input is zero, subnormal, negative or not finite",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_is_done_to_a_layer_is_named(case: str, folder: Path) -> None:
    part, change, sentence = CHANGES[case]
    name = f"{LAYER}.{part}"
    edit(folder, {name: change(load_file(folder / "model.safetensors")[name])})
    ((layer, fault),) = prove(folder).found
    assert layer == LAYER
    assert sentence in fault


def test_a_layer_without_a_form_and_a_float_layer_are_named(folder: Path) -> None:
    configure(folder, lambda layers: layers.pop(LAYER))
    assert (LAYER, "config.json does not describe it") in prove(folder).found
    held = load_file(folder / "model.safetensors")
    names = [name for name in held if name.startswith(f"{LAYER}.")]
    edit(folder, {**dict.fromkeys(names), f"{LAYER}.weight": torch.randn(32, 64)})
    assert prove(folder).found == [(f"{LAYER}.weight", "it is left in float32")]


def test_other_bits_than_claimed_are_named(folder: Path) -> None:
    configure(folder, lambda layers: layers[LAYER].update(weight_bits=8))
    assert dict(prove(folder).found)[LAYER] == "its codes is torch.uint8 of shape 32 x 32"

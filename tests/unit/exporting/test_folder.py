"""An exported checkpoint holds the codes, scales and zero points of the packed one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qvlm.errors import UserError
from qvlm.exporting.command import main
from qvlm.exporting.compressed_tensors import BYTES, LAYOUTS, PACKED, require_expressible
from qvlm.exporting.folder import export
from qvlm.packing.form import Form
from qvlm.packing.model import packed_layers
from qvlm.proving.proof import prove
from tests.helpers.exported import SPECS, packed_language_model, packed_llava


def tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def settings(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes of rows of int32 words, bit by bit in NumPy."""
    stream = np.unpackbits(words.numpy().view(np.uint8), axis=1, bitorder="little")
    codes = stream[:, : count * bits].reshape(len(words), count, bits) @ (1 << np.arange(bits))
    return torch.from_numpy(codes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", SPECS)
def test_codes_scales_and_zero_points_are_those_of_each_layer(
    spec: str, layout: str, tmp_path: Path
) -> None:
    model = packed_language_model(tmp_path / "packed", *SPECS[spec])
    assert export(tmp_path / "packed", tmp_path / "out", layout) == 14
    held = tensors(tmp_path / "out")
    for name, layer in packed_layers(model).items():
        bits, (out, width) = layer.form.weight_bits, (layer.out_features, layer.in_features)
        scale = held[f"{name}.weight_scale"]
        stored, middle = held.get(f"{name}.weight_zero_point"), 2 ** (bits - 1)
        zero = torch.full(scale.shape, middle)
        if layout == BYTES:
            codes = held[f"{name}.weight"].long() + middle
            zero = zero if stored is None else stored.long() + middle
        else:
            assert held[f"{name}.weight_shape"].tolist() == [out, width]
            codes = unpacked(held[f"{name}.weight_packed"], bits, width)
            zero = zero if stored is None else unpacked(stored.T.contiguous(), bits, out).T
        assert torch.equal(codes, layer.weight_codes().long())
        grouped = codes.view(out, scale.shape[1], -1)
        value = (grouped - zero[..., None]).float() * scale[..., None]
        assert torch.equal(value.flatten(1), layer.dequantized())
    rest = {
        n: p for n, p in model.state_dict().items() if n.endswith(("norm.weight", "tokens.weight"))
    }
    assert rest
    assert all(torch.equal(held[name], value) for name, value in rest.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_is_proven(layout: str, tmp_path: Path) -> None:
    packed_language_model(tmp_path / "packed")
    export(tmp_path / "packed", tmp_path / "out", layout)
    proof = prove(tmp_path / "out")
    assert proof.found == []
    assert {layer.bits for layer in proof.layers} == {4}


def test_the_configuration_says_what_enters_and_what_stays_float(tmp_path: Path) -> None:
    packed_language_model(tmp_path / "packed")
    export(tmp_path / "packed", tmp_path / "out", PACKED)
    config = settings(tmp_path / "out")
    assert config["architectures"] == ["LlamaForCausalLM"]
    found = config["quantization_config"]
    assert found["ignore"] == ["lm_head"]
    assert [len(group["targets"]) for group in found["config_groups"].values()] == [1, 2]
    assert found["config_groups"]["group_0"] == {
        "format": "pack-quantized",
        "targets": ["Linear"],
        "weights": {
            **{"num_bits": 4, "type": "int", "symmetric": False, "dynamic": False},
            **{"strategy": "channel", "group_size": None},
        },
        "input_activations": {
            **{"num_bits": 8, "type": "int", "symmetric": False, "dynamic": True},
            **{"strategy": "token", "group_size": None},
        },
        "output_activations": None,
    }
    grouped = found["config_groups"]["group_1"]
    assert grouped["targets"] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert (grouped["weights"]["strategy"], grouped["weights"]["group_size"]) == ("group", 32)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not list((tmp_path / "out").glob("*.partial"))


def edit_form(folder: Path, **changes: Any) -> None:
    config = settings(folder)
    config["quantization_config"]["layers"]["model.layers.1.mlp.up_proj"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hadamard": True}, "its input passes a Hadamard transform. Choose a method without one."),
        ({"ordered": True}, "its channels are sorted into clusters. Choose quantizer=per_token"),
        ({"ratio": 0.9}, "its ranges are shrunk. Choose quantizer.ranges=minmax."),
        ({"inputs": "static", "input_shape": [32]}, "each channel of its input has a static scale"),
        (
            {"inputs": "position", "input_shape": [5]},
            "each position of its input has a static scale. Choose quantizer.vision",
        ),
        ({"group_size": 24, "scale_shape": [64, 2]}, "24 does not divide 32 inputs"),
        ({"bias": True}, "the architecture has no place for it or for the bias"),
        (
            {"weight": "normal_float", "scale_shape": [], "group_size": 64, "constants": [0, 32]},
            "its weight is NormalFloat",
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    packed_language_model(tmp_path / "packed")
    edit_form(tmp_path / "packed", **changes)
    with pytest.raises(UserError) as refused:
        export(tmp_path / "packed", tmp_path / "out")
    said = f"compressed-tensors cannot express model.layers.1.mlp.up_proj: {sentence}"
    assert said in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_experts_with_a_scale_per_token_are_refused() -> None:
    form = Form(32, 8, False, "uniform", 4, 32, (8, 1), "token", 8)
    require_expressible("model.layers.0.mlp.up_proj", form)
    with pytest.raises(UserError, match="takes one range for all tokens of an expert"):
        require_expressible("model.layers.0.mlp.experts.1.up_proj", form)
    static = replace(form, inputs="static")
    require_expressible("model.layers.0.mlp.experts.1.up_proj", static)


def test_the_command_writes_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed_language_model(tmp_path / "packed")
    words = [str(tmp_path / "packed"), "--format", "compressed-tensors", "--out"]
    out = str(tmp_path / "out")
    assert main([*words, out]) == 0
    assert capsys.readouterr().out == f"wrote 14 layers to {out}\n"
    assert main([*words, out]) == 2
    assert "is not empty. Give a new or an empty folder." in capsys.readouterr().err
    assert main([out, *words[1:], str(tmp_path / "again")]) == 2
    assert "is not a packed checkpoint" in capsys.readouterr().err
    config = tmp_path / "packed" / "config.json"
    llama = config.read_text()
    config.write_text(llama.replace('"model_type": "llama"', '"model_type": "qwen2_vl"'))
    assert main([*words, str(tmp_path / "again")]) == 2
    said = capsys.readouterr().err
    assert "has model_type=qwen2_vl, whose tensors are not exported. Give a packed LLaVA" in said
    config.write_text(llama)
    (file,) = (tmp_path / "packed").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    assert main([*words, str(tmp_path / "again")]) == 2
    assert "truncated or damaged" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "packed"]


def test_a_llava_that_transformers_has_a_class_for_gets_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--format", "compressed-tensors", "--out"]
    for projector, kind in (("mlp2x_gelu", "llava"), ("linear", "qvlm_llava")):
        folder, out = tmp_path / projector, tmp_path / f"{projector}-out"
        packed_llava(folder, projector)
        assert main([str(folder), *words, str(out)]) == 0
        config = settings(out)
        assert config["model_type"] == kind
        assert ("projector_type" in config) == (kind == "qvlm_llava")
        assert ("import qvlm" in capsys.readouterr().out) == (kind == "qvlm_llava")

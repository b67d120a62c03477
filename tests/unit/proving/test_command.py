"""`qvlm prove`: its page, its JSON, its exit codes, and what it does not open."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from qvlm.proving.command import main
from tests.helpers.foreign import edit, write_gptq, write_mixture

MADE = Path(__file__).parents[2] / "quantized"


def test_a_sound_checkpoint_ends_with_0_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(MADE / "ct_w4")]) == 0
    page = capsys.readouterr().out
    assert "| model.layers.1.mlp.up_proj      | 64 x 32 |    4 |" in page
    assert "1184 parameters, 6.0 % of all: 1024 in table, 160 in other." in page
    assert page.splitlines()[-1] == (
        f"{MADE / 'ct_w4'} is proven in its weights: 14 layers of 4 bits; 6.0 % of the parameters "
        "are in floating point."
    )


def test_another_ends_with_1_and_names_the_first_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = write_gptq(tmp_path / "model")
    edit(folder, {"model.layers.1.mlp.up_proj.scales": None})
    edit(folder, {"model.layers.0.mlp.gate_proj.weight": torch.randn(64, 32)})
    assert main([str(folder)]) == 1
    said = capsys.readouterr()
    assert "- model.layers.1.mlp.up_proj: its tensor scales is missing\n" in said.out
    assert "gate_proj.weight |       2048 | should be quantized |" in said.out
    assert said.err == (
        f"error: {folder} is not proven (2 faults): model.layers.1.mlp.up_proj: its tensor scales "
        "is missing; 25.2 % of the parameters are in floating point.\n"
    )


def test_json_holds_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_mixture(tmp_path / "model")
    assert main([str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["holds"]
    assert found["verdict"].startswith("proven in its weights: 26 layers of 4 bits")
    assert len(found["layers"]) == 26
    routers = [part["name"] for part in found["floats"] if part["kind"] == "router"]
    assert routers == ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"]
    edit(folder, {"model.layers.0.self_attn.q_proj.weight_scale": torch.zeros(32, 1)})
    assert main([str(folder), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["holds"]
    (layer,) = (layer for layer in found["layers"] if layer["faults"])
    assert layer["layer"] == "model.layers.0.self_attn.q_proj"


class Code:
    """A pickle that would write a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.file), "w")


def test_what_cannot_be_opened_ends_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MADE / "ct_w4", folder)
    config = json.loads((folder / "config.json").read_text())

    def refused(sentence: str, path: Path = folder) -> None:
        assert main([str(path)]) == 2
        said = capsys.readouterr().err
        assert sentence in said
        assert said.count("\n") == 1

    refused("is not there", tmp_path / "none")
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    refused("does not say that it is quantized")
    settings = {"quantization_config": {"quant_method": "quip"}}
    (folder / "config.json").write_text(json.dumps(config | settings))
    refused("quant_method='quip' is not read. Read are: awq, bitsandbytes")
    (folder / "config.json").write_text(json.dumps(config))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    refused("truncated or damaged")
    (folder / "model.safetensors").unlink()
    refused("has no weights")
    planted = tmp_path / "planted"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Code(planted)}, 2))
    refused("holds other things than tensors")
    assert not planted.exists()
    file = tmp_path / "model.gguf"
    file.write_bytes((MADE / "q4_0.gguf").read_bytes()[:-64])
    refused("ends beyond the end of the file", file)
    file.write_bytes(b"GGUF" + bytes(3))
    refused("is not a whole GGUF file", file)
    file.write_bytes(b"other")
    refused("does not begin with GGUF", file)

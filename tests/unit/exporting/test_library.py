"""The compressed-tensors library loads an export through transformers, and finds the same model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from qvlm.exporting.compressed_tensors import PACKED
from qvlm.exporting.folder import export
from qvlm.methods.smoothquant import SmoothQuant
from qvlm.packing.model import packed_layers
from tests.helpers.exported import BATCHES, SPECS, packed_language_model, packed_llava
from tests.helpers.toy import toy_batch

pytest.importorskip("compressed_tensors")


@pytest.mark.parametrize("spec", SPECS)
def test_transformers_loads_it_with_the_library_and_answers_alike(
    spec: str, tmp_path: Path
) -> None:
    model = packed_language_model(tmp_path / "packed", *SPECS[spec])
    export(tmp_path / "packed", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(loaded) is LlamaForCausalLM
    assert_alike(loaded, model, BATCHES[0])


def test_what_a_method_did_to_the_float_model_is_exported(tmp_path: Path) -> None:
    model = packed_language_model(tmp_path / "packed", method=SmoothQuant(0.5))
    export(tmp_path / "packed", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert_alike(loaded, model, BATCHES[0])


def test_a_llava_answers_alike(tmp_path: Path) -> None:
    model = packed_llava(tmp_path / "packed", "mlp2x_gelu")
    export(tmp_path / "packed", tmp_path / "out")
    kind = AutoModelForImageTextToText
    loaded = kind.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(loaded) is LlavaForConditionalGeneration
    assert_alike(loaded, model, toy_batch())


@pytest.mark.parametrize("spec", SPECS)
def test_the_library_unpacks_what_is_packed(spec: str, tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    model = packed_language_model(tmp_path / "packed", *SPECS[spec])
    export(tmp_path / "packed", tmp_path / "out", PACKED)
    held = load_file(tmp_path / "out" / "model-00001.safetensors")
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    schemes = [QuantizationScheme(**group) for group in groups["config_groups"].values()]
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for name, layer in packed_layers(model).items():
        named = [scheme for scheme in schemes if name in scheme.targets]
        state = {
            key.removeprefix(f"{name}."): value
            for key, value in held.items()
            if key.startswith(f"{name}.")
        }
        weight = compressor.decompress(state, (named or schemes)[0])["weight"]
        torch.testing.assert_close(weight, layer.dequantized())


@torch.no_grad()
def assert_alike(loaded: Any, model: Any, batch: dict[str, Tensor]) -> None:
    """Logits differ by rounding, and the weights are those of the packed layers."""
    found, expected = loaded(**batch).logits, model(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for name, layer in packed_layers(model).items():
        torch.testing.assert_close(loaded.get_submodule(name).weight, layer.dequantized())

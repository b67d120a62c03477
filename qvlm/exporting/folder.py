"""Writes a packed checkpoint in the format of compressed-tensors.

What a method did to the float model is in the tensors that are copied: norms that it folded, a
stream that it rotated, biases that it added. A LLaMA, and a LLaVA that transformers' own class can
hold, get the names of transformers' classes, so that nothing of qvlm is needed to load them.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qvlm.errors import UserError
from qvlm.exporting.compressed_tensors import (
    BYTES,
    is_symmetric,
    layer_tensors,
    require_expressible,
    scheme,
)
from qvlm.models.checkpoints.families import read_config
from qvlm.models.checkpoints.language_model import is_language_model, read_language_model
from qvlm.models.checkpoints.own import read_architecture
from qvlm.models.checkpoints.weights import Weights
from qvlm.models.llava import LlavaArchitecture
from qvlm.models.meta import meta_model
from qvlm.packing.checkpoint import PackedConfig, is_packed
from qvlm.packing.form import Form, buffers
from qvlm.packing.origin import ORIGIN
from qvlm.records.files import write_file, write_folder

METHOD = "compressed-tensors"
# Other families may keep experts fused, or name tensors otherwise in their checkpoints.
EXPORTED = ("llama", "llava", LlavaArchitecture.model_type)
SHARD_BYTES = 2 * 10**9
_INDEX = "model.safetensors.index.json"
# Kinds of files that go along: the tokenizer, the image processor and their templates.
_COPIED = (".json", ".jinja", ".model", ".txt")
_REWRITTEN = ("config.json", _INDEX, ORIGIN)


def export(folder: Path, out: Path, layout: str = BYTES) -> int:
    """Writes a packed checkpoint in the format of compressed-tensors.

    Args:
        folder: Folder of a packed checkpoint.
        out: New or empty folder to write.
        layout: One of `compressed_tensors.LAYOUTS`.

    Returns:
        Number of layers that were written.

    Raises:
        UserError: If the folder is not a packed checkpoint, a layer cannot be expressed, or `out`
            holds files.
        OSError: If it cannot be written.
    """
    config = read_config(folder, "export")
    if not is_packed(config):
        raise UserError(f"export: {folder} is not a packed checkpoint. Give save_packed=FOLDER's.")
    if (kind := config.get("model_type")) not in EXPORTED:
        raise UserError(
            f"export: {folder} has model_type={kind}, whose tensors are not exported. Give a "
            "packed LLaVA or LLaMA."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"export: --out={out} is not empty. Give a new or an empty folder.")
    forms = _forms(config)
    for name, form in forms.items():
        require_expressible(name, form)
    weights = Weights(folder, "export")
    written = _exported_config(config, forms, weights, layout)

    def fill(partial: Path) -> None:
        _write_shards(partial, _exported(forms, weights, layout))
        write_file(partial / "config.json", json.dumps(written, indent=2) + "\n")
        for file in sorted(folder.iterdir()):
            if file.suffix in _COPIED and file.name not in _REWRITTEN and file.is_file():
                write_file(partial / file.name, file.read_bytes())

    write_folder(out, fill)
    return len(forms)


def _forms(config: Mapping[str, Any]) -> dict[str, Form]:
    settings = config["quantization_config"]
    try:
        return PackedConfig(settings.get("layers"), settings.get("version")).forms()
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"export: config.json does not describe packed layers: {error}.") from error


def _numbers(name: str, form: Form, weights: Weights) -> dict[str, Tensor]:
    """Reads the buffers of a layer.

    Raises:
        UserError: If one is missing or has another shape or type than its form says.
    """
    found = {}
    for part, (shape, dtype) in buffers(form).items():
        tensor = weights.get(f"{name}.{part}")
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise UserError(
                f"export: {name}.{part} is missing or does not fit config.json. Give a whole copy."
            )
        found[part] = tensor
    return found


def _exported(
    forms: Mapping[str, Form], weights: Weights, layout: str
) -> Iterator[tuple[str, Tensor]]:
    for name, form in forms.items():
        numbers = _numbers(name, form, weights)
        for part, tensor in layer_tensors(form, numbers, layout).items():
            yield f"{name}.{part}", tensor
    packed = {f"{name}.{part}" for name, form in forms.items() for part in buffers(form)}
    for name in weights:
        if name not in packed:
            yield name, weights[name]


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Writes tensors into shards of up to `SHARD_BYTES`, and the index of these."""
    held: dict[str, Tensor] = {}
    placed: dict[str, str] = {}
    total = shards = 0

    def write() -> None:
        file = f"model-{shards:05}.safetensors"
        content = dict(held)
        write_file(folder / file, lambda path: save_file(content, path, {"format": "pt"}))
        placed.update(dict.fromkeys(held, file))
        held.clear()

    for name, tensor in tensors:
        if held and sum(map(_size, held.values())) + _size(tensor) > SHARD_BYTES:
            shards += 1
            write()
        held[name] = tensor.contiguous()
        total += _size(tensor)
    shards += 1
    write()
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    write_file(folder / _INDEX, json.dumps(index, indent=2) + "\n")


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _exported_config(
    config: Mapping[str, Any], forms: Mapping[str, Form], weights: Weights, layout: str
) -> dict[str, Any]:
    ignored = _linears(config, forms)
    schemes: dict[str, list[str]] = {}
    for name, form in forms.items():
        symmetric = is_symmetric(form, _numbers(name, form, weights)["zero_point"])
        schemes.setdefault(json.dumps(scheme(form, symmetric, layout)), []).append(name)
    # The scheme of most layers is that of all linears, and the others name their layers.
    ranked = sorted(schemes.items(), key=lambda item: -len(item[1]))
    groups = {
        f"group_{index}": {**json.loads(found), "targets": names if index else ["Linear"]}
        for index, (found, names) in enumerate(ranked)
    }
    quantization = {
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "format": layout,
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return {**_architecture(config), "quantization_config": quantization}


def _float_model(config: Mapping[str, Any]) -> nn.Module:
    """Builds the model that a config.json describes on the meta device."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if is_language_model(plain):
        return meta_model(read_language_model(plain, "export"), torch.float32)
    return meta_model(read_architecture(plain, "export"), torch.float32)


def _linears(config: Mapping[str, Any], forms: Mapping[str, Form]) -> list[str]:
    """Names of the linears of a model that are not packed, the head among them.

    Raises:
        UserError: If a packed layer has a bias that the architecture has no place for.
    """
    model = _float_model(config)
    linears = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    for name, form in forms.items():
        if name not in linears or (form.bias and linears[name].bias is None):
            raise UserError(
                f"export: compressed-tensors cannot express {name}: the architecture has no place "
                "for it or for the bias that its method gave it. Choose another method."
            )
    return sorted(linears.keys() - forms.keys())


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration with transformers' own class where that can hold the model."""
    plain = _in_float32(config)
    if config.get("model_type") == "llama":
        return {**plain, "architectures": ["LlamaForCausalLM"]}
    text = config.get("text_config") or {}
    two_layers = config.get("projector_type") == "mlp2x_gelu"
    image = config.get("image_token_index", config.get("image_token_id", 0))
    fits = text.get("model_type") == "llama" and image < text.get("vocab_size", 0)
    if not two_layers or not fits or config.get("head_bias"):
        return plain
    kept = {
        key: value for key, value in plain.items() if key not in ("projector_type", "head_bias")
    }
    return {**kept, "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}


def _in_float32(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration in which float32 stands for float64, in which no engine computes."""
    return {
        key: _in_float32(value)
        if isinstance(value, Mapping)
        else ("float32" if key == "dtype" and value == "float64" else value)
        for key, value in config.items()
        if key != "quantization_config"
    }


def needs_qvlm(folder: Path) -> bool:
    """Whether an exported checkpoint has an architecture that `import qvlm` registers."""
    return str(read_config(folder, "export").get("model_type")).startswith("qvlm")

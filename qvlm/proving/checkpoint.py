"""Opens a quantized checkpoint in any format, without its library and without running its code."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from qvlm.errors import UserError
from qvlm.models.checkpoints.families import read_config
from qvlm.models.checkpoints.weights import Weights
from qvlm.packing.checkpoint import METHOD
from qvlm.proving.formats import (
    Awq,
    BitsAndBytes,
    CompressedTensors,
    Format,
    Gguf,
    Gptq,
    Own,
    TorchAo,
)
from qvlm.proving.gguf import GgufFile

# The format behind each `quant_method` of a config.json; torchao also needs a header.
_FORMATS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], Format]] = {
    "awq": Awq,
    "bitsandbytes": BitsAndBytes,
    "compressed-tensors": CompressedTensors,
    "gptq": Gptq,
    METHOD: Own,
}
KNOWN = ", ".join(sorted([*_FORMATS, "torchao"])) + ", and files of GGUF"


def open_checkpoint(path: Path) -> Format:
    """Opens a quantized checkpoint.

    Args:
        path: Folder with a config.json and safetensors, or GGUF file.

    Raises:
        UserError: If there is no such checkpoint, it is in floating point, its format is not known,
            or a file of it is damaged.
    """
    owner = "prove"
    if path.is_file():
        return Gguf(GgufFile(path))
    if not path.is_dir():
        raise UserError(f"{owner}: {path} is not there. Give a folder or a GGUF file.")
    config = read_config(path, owner)
    settings = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(settings, Mapping):
        raise UserError(
            f"{owner}: {path} does not say that it is quantized: its config.json has no "
            "quantization_config. Give a quantized checkpoint."
        )
    method = settings.get("quant_method", "compressed-tensors")
    if method == "torchao":
        weights = Weights(path, owner)
        return TorchAo(weights, settings, _header(weights))
    if method not in _FORMATS:
        raise UserError(f"{owner}: quant_method={method!r} is not read. Read are: {KNOWN}.")
    return _FORMATS[method](Weights(path, owner), settings)


def _header(weights: Weights) -> dict[str, str]:
    """Returns the metadata of all safetensors files of a checkpoint."""
    found: dict[str, str] = {}
    for file in {weights.file(name) for name in weights}:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                found |= opened.metadata() or {}
    return found

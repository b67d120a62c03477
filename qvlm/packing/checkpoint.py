"""Packed checkpoints in transformers' format: sharded safetensors, loaded without a float model.

`save_packed` writes the form of every packed layer into `config.json`; its tensors are ordinary
entries of the state dict. With this module imported, `from_pretrained` knows the format: it puts
empty packed layers into the skeleton of the model, which has no memory yet, and fills them from the
shards. `load_packed` is `from_pretrained` with every way to fail said in one sentence.

Left out: other formats, and quantizing on the way in.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from qvlm.errors import UserError
from qvlm.packing.form import Form
from qvlm.packing.layer import PackedLinear
from qvlm.packing.model import packed_layers

METHOD = "qvlm_packed"
VERSION = 2
# Before version 2 channels were stored in their own order, which is what a form says by default.
READABLE = (1, 2)
# What the model was quantized with; beside the weights, because it is nothing to load them with.
ORIGIN = "qvlm.json"


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """What `config.json` says of a packed checkpoint.

    Args:
        layers: the `Form` of each packed layer, by full name.
        version: of the format.

    Raises:
        UserError: for a version that this code does not know.
    """

    def __init__(
        self, layers: dict[str, dict[str, Any]], version: int = VERSION, **kwargs: Any
    ) -> None:
        if version not in READABLE:
            accepted = " and ".join(map(str, READABLE))
            raise UserError(f"packed format version {version!r}: accepted are {accepted}")
        self.quant_method = METHOD
        self.layers = layers
        self.version = version


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Puts empty packed layers where the checkpoint has them."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for name, fields in self.quantization_config.layers.items():
            values: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
            }
            with torch.device("meta"):
                model.set_submodule(name, PackedLinear(Form(**values), layer_name=name))

    def is_serializable(self) -> bool:
        """Packed models can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """There are no gradients."""
        return False


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's config.json says that it is packed."""
    return (config.get("quantization_config") or {}).get("quant_method") == METHOD


def write_origin(folder: str | Path, origin: Mapping[str, Any]) -> None:
    """Writes what a packed checkpoint was quantized with; last, so that it marks a whole one."""
    (Path(folder) / ORIGIN).write_text(json.dumps(origin, indent=2), encoding="utf-8")


def read_origin(folder: str | Path) -> dict[str, Any]:
    """What a packed checkpoint was quantized with.

    Raises:
        UserError: if the folder does not say.
    """
    try:
        origin = json.loads((Path(folder) / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.packed: {folder} has no readable {ORIGIN}; give a folder that "
            "python run.py save_packed=FOLDER wrote"
        ) from error
    assert isinstance(origin, dict)
    return origin


def save_packed(model: PreTrainedModel, folder: str | Path, shard_size: str = "2GB") -> None:
    """Writes a packed model with `save_pretrained`.

    Raises:
        UserError: if the model has no packed layer.
    """
    layers = packed_layers(model)
    if not layers:
        raise UserError(f"{type(model).__name__} has no packed layer to save: pack it before")
    describe(model, {name: asdict(layer.form) for name, layer in layers.items()})
    # Tensors keep the names that they have in the model, wherever it was loaded from.
    model._weight_conversions = []
    model.save_pretrained(folder, max_shard_size=shard_size)


def describe(model: PreTrainedModel, forms: dict[str, dict[str, Any]]) -> None:
    """Has a model's configuration say which of its layers are packed, and their `Form`."""
    config = PackedConfig(forms)
    model.config.quantization_config = config
    model.hf_quantizer = PackedQuantizer(config, pre_quantized=True)


def load_packed(kind: type[PreTrainedModel], folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Loads a checkpoint of `save_packed` in evaluation mode.

    Args:
        kind: the model's class.
        kwargs: further arguments of `from_pretrained`.

    Raises:
        UserError: if the folder is no packed checkpoint, of an unknown version, truncated, or does
            not fit its config.json.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not is_packed(config):
            raise UserError(f"{folder} is no packed checkpoint: its config.json does not say so")
        model, report = kind.from_pretrained(folder, output_loading_info=True, **kwargs)
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder} does not load: {reason}") from error
    problems = {problem: sorted(map(str, keys)) for problem, keys in report.items() if keys}
    if problems:
        problem, keys = next(iter(problems.items()))
        raise UserError(
            f"{folder} does not fit its config.json: {len(keys)} {problem.replace('_', ' ')}, "
            f"first {keys[0]}"
        )
    return model.eval()

"""Packed checkpoints in transformers' format: sharded safetensors, loaded without a float model.

`save_packed` writes the form of every packed layer into `config.json`; its tensors are ordinary
entries of the state dict. Importing this module teaches `from_pretrained` the format: it puts empty
packed layers into the model on the meta device and fills them from the shards. `load_packed` calls
`from_pretrained` and turns every way to fail into one sentence.

Left out: other formats, and quantizing a float checkpoint while it is loaded.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from qvlm.errors import UserError
from qvlm.packing.form import Form, buffers
from qvlm.packing.layer import PackedLinear
from qvlm.packing.model import packed_layers
from qvlm.quantization.experts import unfuse_experts
from qvlm.quantization.quantizer import SMALLEST_SCALE
from qvlm.records.strict import build

METHOD = "qvlm_packed"
VERSION = 3
# Forms of version 1 have no order of channels, and those of version 2 no transform of inputs; both
# are what a form has by default.
READABLE = (1, 2, 3)
# What safetensors calls the types of buffers.
_TYPES = {torch.uint8: "U8", torch.int32: "I32"}

AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)  # the stand-in of `qvlm.registration`


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """The part of `config.json` that describes a packed checkpoint.

    Args:
        layers: Fields of the `Form` of each packed layer, by full name.
        version: Version of the format.

    Raises:
        UserError: If this code does not know the version.
        ValueError: If the fields are not those of a `Form`.
    """

    def __init__(
        self, layers: dict[str, dict[str, Any]], version: int = VERSION, **kwargs: Any
    ) -> None:
        if version not in READABLE:
            choices = " or ".join(map(str, READABLE))
            raise UserError(
                f"Version {version!r} of the packed format is not known. Give a checkpoint of "
                f"version {choices}."
            )
        self.quant_method = METHOD
        self.layers = layers
        self.version = version
        self.forms()  # refused as soon as the file is read

    def forms(self) -> dict[str, Form]:
        """Returns the form of each packed layer, by full name.

        Raises:
            ValueError: If the fields are not those of a `Form`.
        """
        plain = json.loads(json.dumps(self.layers))  # tuples become lists, as in a file
        return build(dict[str, Form], plain, "quantization_config.layers", defaults=True)


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Puts an empty packed layer in place of each layer that is packed in the checkpoint."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        unfuse_experts(model)  # a walk has taken them apart before they were quantized
        head: Any = model.get_output_embeddings()
        if getattr(model.config, "head_bias", False) and head.bias is None:
            # A rotation has folded the shift of the last norm into it, and config.json says so.
            bias = torch.empty(head.out_features, dtype=head.weight.dtype, device="meta")
            head.bias = nn.Parameter(bias, requires_grad=False)
        for name, form in self.quantization_config.forms().items():
            try:
                linear = model.get_submodule(name)
            except AttributeError as error:
                raise ValueError(f"the model has no layer {name}") from error
            if not isinstance(linear, nn.Linear) or not _fits(form, linear):
                raise ValueError(f"the form of {name} is not that of the model's layer")
            with torch.device("meta"):
                model.set_submodule(name, PackedLinear(form, layer_name=name))
            # Some parents initialize the weights of their linears, which packed layers do not have.
            parent: Any = model.get_submodule(name.rpartition(".")[0])
            parent._is_hf_initialized = True

        files = kwargs.get("checkpoint_files") or ()
        _require_types(map(Path, files), self.quantization_config.forms())

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, layer in packed_layers(model).items():
            if not layer.codes.is_meta:
                _require_numbers(name, layer)
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns the tensors that `save_pretrained` writes, and no metadata."""
        return {name: in_float32(tensor) for name, tensor in model.state_dict().items()}, {}

    def is_serializable(self) -> bool:
        """Packed models can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed models cannot be trained: their layers have no gradients."""
        return False


def _fits(form: Form, linear: nn.Linear) -> bool:
    """Whether a packed layer can replace a linear; a method may have given it a bias."""
    sizes = form.in_features, form.out_features
    return sizes == (linear.in_features, linear.out_features) and (form.bias or linear.bias is None)


def _require_types(files: Iterable[Path], forms: Mapping[str, Form]) -> None:
    """Refuses buffers of another type, which transformers converts or takes as they are.

    Raises:
        ValueError: If a file holds one. Its bits would be read as other numbers.
    """
    expected = {
        f"{name}.{part}": dtype
        for name, form in forms.items()
        for part, (_, dtype) in buffers(form).items()
    }
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in expected.keys() & opened.keys():
                found, dtype = opened.get_slice(key).get_dtype(), expected[key]
                if found != _TYPES[dtype]:
                    raise ValueError(f"{key} is stored as {found}, and {_TYPES[dtype]} is needed")


def _require_numbers(name: str, layer: PackedLinear) -> None:
    """Refuses numbers that no quantizer has; kernels read memory by some of them.

    Raises:
        ValueError: If the layer holds one.
    """
    form = layer.form
    order = layer.channels().sort().values
    if not torch.equal(order, torch.arange(layer.in_features, device=order.device)):
        raise ValueError(f"the order of {name} is not a permutation")
    present = dict(layer.named_buffers())
    for part, bits in (("zero_point", form.weight_bits), ("input_zero_point", form.input_bits)):
        if part in present and bool((present[part] > 2**bits - 1).any()):
            raise ValueError(f"the {part} of {name} has numbers of more than {bits} bits")
    for part in {"scale", "mean", "bias", "input_scale"} & present.keys():
        numbers = present[part].view(torch.float32)
        if not bool(numbers.isfinite().all()):
            raise ValueError(f"the {part} of {name} has numbers that are not finite")
        uniform = part == "input_scale" or (part == "scale" and form.weight == "uniform")
        if uniform and bool((numbers < SMALLEST_SCALE).any()):
            raise ValueError(f"the {part} of {name} has numbers that are no scales")


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether the config.json of a checkpoint says that it is packed."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == METHOD


def save_packed(model: PreTrainedModel, folder: str | Path, shard_size: str = "2GB") -> None:
    """Writes a packed model with `save_pretrained`.

    Numbers in float64 are written in float32, which holds them exactly: they were read from a
    checkpoint, or rounded to float32 by the method that made them.

    Args:
        model: Packed model.
        folder: Folder to write to.
        shard_size: Largest size of a shard.

    Raises:
        UserError: If the model has no packed layer.
    """
    layers = packed_layers(model)
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no packed layer to save. Pack the model first."
        )
    add_packed_config(model, {name: asdict(layer.form) for name, layer in layers.items()})
    # Tensors are saved under their names in the model, not under those of the original checkpoint.
    model._weight_conversions = []
    model.save_pretrained(folder, max_shard_size=shard_size)


def in_float32(tensor: Tensor) -> Tensor:
    """Returns a tensor in the type in which it is saved: float32 instead of float64."""
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def add_packed_config(model: PreTrainedModel, forms: dict[str, dict[str, Any]]) -> None:
    """Adds the packed layers to the configuration of a model.

    Args:
        model: Model whose configuration will be saved.
        forms: Fields of the `Form` of each packed layer, by full name.
    """
    config = PackedConfig(forms)
    model.config.quantization_config = config
    model.hf_quantizer = PackedQuantizer(config, pre_quantized=True)


def load_packed(kind: type[PreTrainedModel], folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Loads a checkpoint of `save_packed` in evaluation mode.

    Args:
        kind: Class of the model.
        folder: Folder of the checkpoint.
        kwargs: Further arguments of `from_pretrained`.

    Raises:
        UserError: If the folder is not a packed checkpoint, has an unknown version, is truncated,
            or does not fit its config.json.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not is_packed(config):
            raise UserError(
                f"{folder} is not a packed checkpoint: its config.json does not describe one."
            )
        if (folder / "adapter_config.json").exists():  # it would name another model's weights
            raise UserError(
                f"{folder} is not a packed checkpoint: it has an adapter_config.json. Remove it."
            )
        model, report = kind.from_pretrained(
            folder, output_loading_info=True, use_safetensors=True, **kwargs
        )
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

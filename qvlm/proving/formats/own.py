"""Packed checkpoints of qvlm: see `qvlm.packing.form` for what a layer stores."""

from typing import Any

import torch
from torch import Tensor

from qvlm.errors import UserError
from qvlm.packing.absmax import dequantize_absmax
from qvlm.packing.checkpoint import PackedConfig
from qvlm.packing.form import Form, buffers
from qvlm.proving.formats.base import Format
from qvlm.proving.stored import StoredWeight, UnreadableError, by_scale, shown, unpacked
from qvlm.quantization.normal_float import normal_float_levels


class Own(Format):
    """A packed checkpoint of qvlm."""

    name = "qvlm"
    suffixes = (".codes",)
    carriers = (
        *(".scale", ".zero_point", ".mean", ".constant_codes", ".order", ".bias"),
        *(".input_scale", ".input_zero_point"),
    )

    def __init__(self, tensors: Any, settings: Any) -> None:
        super().__init__(tensors, settings)
        self._forms = _forms(settings)

    def layers(self) -> list[str]:
        """See `Format.layers`."""
        return list(dict.fromkeys([*self._forms, *super().layers()]))

    def read(self, layer: str) -> StoredWeight:
        """See `Format.read`."""
        if layer not in self._forms:
            raise UnreadableError("config.json does not describe it")
        form = self._forms[layer]
        parts = {}
        for part, (shape, dtype) in buffers(form).items():
            tensor = self.tensor(layer, f".{part}")
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise UnreadableError(f"its {part} is {tensor.dtype} of shape {shown(tensor)}")
            parts[part] = tensor
        codes = unpacked(parts["codes"], form.weight_bits, form.in_features, "codes")
        common: dict[str, Any] = {
            "shape": (form.out_features, form.in_features),
            "bits": form.weight_bits,
            "claimed_bits": form.weight_bits,
        }
        if "input_scale" in parts:
            common["input_scale"] = parts["input_scale"].view(torch.float32)
        if form.weight == "uniform":
            scale = parts["scale"].view(torch.float32)
            zero = parts["zero_point"].flatten()
            rows = _by_group(codes, form)
            return StoredWeight(codes=rows, scale=scale.flatten(), zero_point=zero, **common)
        return StoredWeight(**_normal_float(codes, form, parts), **common)

    def claim(self) -> str:
        """See `Format.claim`."""
        said = {f"W{form.weight_bits}A{form.input_bits}" for form in self._forms.values()}
        return ", ".join(sorted(said))


def _forms(settings: Any) -> dict[str, Form]:
    try:
        return PackedConfig(settings.get("layers"), settings.get("version")).forms()
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"config.json does not describe packed layers: {error}.") from error


def _by_group(codes: Tensor, form: Form) -> Tensor:
    """Codes of a uniform weight in rows that share a scale, whose last group may be smaller."""
    short = -form.in_features % form.group_size
    if short:
        codes = torch.cat([codes, codes[:, -1:].expand(-1, short)], dim=1)
    return by_scale(codes, torch.empty(form.scale_shape))


def _normal_float(codes: Tensor, form: Form, parts: dict[str, Tensor]) -> dict[str, Any]:
    nested = parts["scale"].view(torch.float32)
    absmax = dequantize_absmax(
        parts.get("constant_codes"),
        nested,
        parts["mean"].view(torch.float32),
        form.constant_block_size,
    )
    flat = codes.flatten()
    short = -len(flat) % form.group_size
    return {
        "codes": torch.cat([flat, flat[-1:].expand(short)]).view(-1, form.group_size),
        "scale": absmax,
        "levels": normal_float_levels(form.weight_bits),
        "outer": nested if form.constants[0] else None,
        "signed": True,
    }

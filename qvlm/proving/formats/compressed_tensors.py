"""compressed-tensors, the format of llm-compressor and vLLM.

`pack-quantized` stores codes in int32 words, lowest bit first, with the zero points packed along
the rows. `int-quantized` and `naive-quantized` store int8, and `float-quantized` float8. Codes are
stored plus 2^(bits - 1) where they are packed.

Source: https://github.com/vllm-project/compressed-tensors, version 0.20. Not read: the NVFP4 and MX
formats, whose scales are floats of 8 bits, and the sparse ones.
"""

from typing import Any

import torch
from torch import Tensor

from qvlm.proving.formats.base import Format, matches, number
from qvlm.proving.stored import (
    StoredWeight,
    UnreadableError,
    by_scale,
    require_groups,
    shown,
    unpacked,
)

_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")


class CompressedTensors(Format):
    """A checkpoint of compressed-tensors."""

    name = "compressed-tensors"
    suffixes = (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape")
    carriers = (
        *(".weight", ".weight_g_idx", ".weight_global_scale"),
        *(".input_scale", ".input_zero_point", ".input_global_scale"),
    )

    def read(self, layer: str) -> StoredWeight:
        """See `Format.read`."""
        group = self._group(layer)
        args, kind = group.get("weights") or {}, group.get("format") or self.settings.get("format")
        if kind == "mixed-precision":
            kind = "pack-quantized" if f"{layer}.weight_packed" in self.tensors else "int-quantized"
        if kind not in _FORMATS:
            raise UnreadableError(f"the format {kind!r} is not read")
        bits = number(args, "num_bits")
        scale = self._two_dimensional(self.tensor(layer, ".weight_scale"))
        if kind == "pack-quantized":
            stored, codes, zero = self._packed(layer, bits, scale)
        else:
            stored, codes, zero = self._in_bytes(layer, scale)
        if args.get("strategy") in ("group", "channel"):
            group_size = args.get("group_size") if args["strategy"] == "group" else None
            require_groups(scale, codes.shape[1], group_size)
        if args.get("strategy") in ("group", "channel") and scale.shape[0] != codes.shape[0]:
            raise UnreadableError(f"it has {scale.shape[0]} rows of scales for {len(codes)} rows")
        if not args.get("symmetric", True) and zero is None:
            raise UnreadableError("its tensor weight_zero_point is missing")
        levels = None
        if kind == "float-quantized" or args.get("type") == "float":
            levels = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        return StoredWeight(
            shape=tuple(codes.shape),
            bits=stored,
            claimed_bits=bits,
            codes=by_scale(codes, scale),
            scale=scale.flatten(),
            zero_point=zero,
            fixed_zero=2 ** (stored - 1),
            levels=levels,
            unpacked=kind != "pack-quantized",
            input_scale=self._input_scale(layer, group),
        )

    def claim(self) -> str:
        """See `Format.claim`."""
        said = []
        for group in self._groups():
            weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
            size = weights.get("group_size")
            shared = f" in groups of {size}" if weights.get("strategy") == "group" else ""
            said.append(f"{weights.get('num_bits')} bits{shared}")
            if inputs:
                said[-1] += f", inputs of {inputs.get('num_bits')} bits"
        return "; ".join(said)

    def left_float(self, layer: str) -> bool | None:
        """See `Format.left_float`."""
        if any(_names(entry, layer) for entry in self.settings.get("ignore") or []):
            return True
        everything = any("Linear" in (group.get("targets") or []) for group in self._groups())
        return False if everything or self._targeted(layer) else None

    def _packed(self, layer: str, bits: int, scale: Tensor) -> tuple[int, Tensor, Tensor | None]:
        """Returns the bits of the stored codes, the codes [out, in], and the zero points."""
        packed = self.tensor(layer, ".weight_packed")
        out, width = self._shape(layer, packed)
        taken = [n for n in range(2, 9) if -(-width * n // 32) == packed.shape[1]]
        stored = bits if bits in taken or not taken else taken[-1]
        codes = unpacked(packed, stored, width, "weight_packed")
        zeros = self.optional(layer, ".weight_zero_point")
        if zeros is None:
            return stored, codes, None
        if zeros.dtype != torch.int32 or zeros.shape[1:] != scale.shape[1:]:
            raise UnreadableError(f"its weight_zero_point has shape {shown(zeros)}")
        zero = unpacked(zeros.T, stored, out, "weight_zero_point").T
        return stored, codes, zero.flatten()

    def _shape(self, layer: str, packed: Tensor) -> tuple[int, int]:
        shape = self.tensor(layer, ".weight_shape").tolist()
        if packed.ndim != 2 or packed.dtype != torch.int32:
            raise UnreadableError(f"its weight_packed is {packed.dtype} of shape {shown(packed)}")
        if len(shape) != 2 or shape[0] != packed.shape[0] or shape[1] < 1:
            raise UnreadableError(f"weight_shape is {shape}, and {len(packed)} rows are packed")
        return shape[0], shape[1]

    def _in_bytes(self, layer: str, scale: Tensor) -> tuple[int, Tensor, Tensor | None]:
        weight = self.tensor(layer, ".weight")
        if weight.ndim != 2 or weight.dtype not in (torch.int8, torch.float8_e4m3fn):
            raise UnreadableError(f"its weight is {weight.dtype} of shape {shown(weight)}")
        zero = self.optional(layer, ".weight_zero_point")
        if weight.dtype != torch.int8:
            return 8, weight.view(torch.uint8), None
        if zero is None:
            return 8, _from_zero(weight), None
        if zero.numel() != scale.numel():
            raise UnreadableError(f"its weight_zero_point has shape {shown(zero)}")
        return 8, _from_zero(weight), zero.flatten().to(torch.int16) + 128

    def _input_scale(self, layer: str, group: dict[str, Any]) -> Tensor | None:
        inputs = group.get("input_activations") or {}
        if inputs and not inputs.get("dynamic"):
            return self.tensor(layer, ".input_scale")
        return self.optional(layer, ".input_scale")

    def _groups(self) -> list[dict[str, Any]]:
        groups = self.settings.get("config_groups")
        found = list(groups.values()) if isinstance(groups, dict) else []
        return [group for group in found if isinstance(group, dict)]

    def _targeted(self, layer: str) -> bool:
        return any(
            _names(target, layer) for group in self._groups() for target in group["targets"] or []
        )

    def _group(self, layer: str) -> dict[str, Any]:
        """Returns the group of settings that a layer belongs to; names come before classes."""
        groups = self._groups()
        for group in groups:
            if any(_names(target, layer) for target in group.get("targets") or []):
                return group
        if not groups:
            raise UnreadableError("the configuration has no config_groups")
        of_all = (group for group in groups if "Linear" in (group.get("targets") or []))
        return next(of_all, groups[0])

    @staticmethod
    def _two_dimensional(scale: Tensor) -> Tensor:
        return scale.view(1, 1) if scale.numel() == 1 else scale


def _names(entry: object, layer: str) -> bool:
    """Whether an entry of `ignore` or `targets` names a layer; classes do not."""
    if not isinstance(entry, str):
        return False
    return matches(entry[3:], layer) if entry.startswith("re:") else entry == layer


def _from_zero(weight: Tensor) -> Tensor:
    """Codes from 0, uint8, of signed ones."""
    return (weight.to(torch.int16) + 128).to(torch.uint8)

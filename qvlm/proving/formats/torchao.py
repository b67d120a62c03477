"""torchao, as transformers saves it: tensor subclasses, taken apart into plain tensors.

The header of the safetensors file says for each weight which subclass it is. `_weight_qdata` holds
the codes, `_weight_scale` the scales. `Int8Tensor` and `IntxUnpackedToInt8Tensor` keep one signed
code a byte, `Int4Tensor` two, the first in the low half, with scales [groups, out] and zero points
that are floats, the value of the middle code.

Source: https://github.com/pytorch/ao, version 0.18, `prototype/safetensors` and `quantize_`. Not
read: layouts that a kernel tiles, floats of 8 bits and fewer, and `.bin` files, which are pickles.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qvlm.proving.formats.base import Format, within
from qvlm.proving.stored import StoredWeight, UnreadableError, by_scale, require_groups, shown

_SIGNED = ("Int8Tensor", "IntxUnpackedToInt8Tensor")


class TorchAo(Format):
    """A checkpoint of torchao.

    Args:
        tensors, settings: As for every format.
        header: Metadata of the safetensors files.
    """

    name = "torchao"
    suffixes = ("._weight_qdata", "._weight_scale", "._weight_zero_point")
    carriers = ("._weight_act_pre_scale", "._weight_scale_and_zero")

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        settings: Mapping[str, Any],
        header: Mapping[str, str],
    ) -> None:
        super().__init__(tensors, settings)
        self.header = header

    def read(self, layer: str) -> StoredWeight:
        """See `Format.read`."""
        kind, data = self._described(layer)
        codes, scale = self.tensor(layer, "._weight_qdata"), self.tensor(layer, "._weight_scale")
        zero, minimum = self.optional(layer, "._weight_zero_point"), None
        if codes.ndim != 2 or codes.dtype not in (torch.int8, torch.uint8):
            raise UnreadableError(f"its codes are {codes.dtype} of shape {shown(codes)}")
        if kind in _SIGNED:
            bits, stored = _target_bits(data), 8
            codes = (codes.to(torch.int16) + 128).to(torch.uint8)
            zero = None if zero is None else zero + 128.0
        elif kind == "Int4Tensor":
            bits = stored = 4
            halves = codes.view(torch.uint8)
            codes = torch.stack([halves & 15, halves >> 4], dim=2).flatten(1) ^ 8
            scale = scale.T
            zero, minimum = None, None if zero is None else zero.T
        else:
            raise UnreadableError(f"tensors of the kind {kind} are not read")
        self._require_blocks(data, scale, codes)
        for zeros in (zero, minimum):
            if zeros is not None and zeros.shape != scale.shape:
                raise UnreadableError(f"zero points of {shown(zeros)} for scales of {shown(scale)}")
        return StoredWeight(
            shape=tuple(codes.shape),
            bits=stored,
            claimed_bits=bits,
            codes=by_scale(codes, scale),
            scale=scale.flatten(),
            zero_point=None if zero is None else zero.flatten(),
            fixed_zero=2 ** (stored - 1),
            minimum=None if minimum is None else minimum.flatten(),
            unpacked=kind in _SIGNED,
        )

    def claim(self) -> str:
        """See `Format.claim`."""
        kinds = self.settings.get("quant_type")
        found = kinds.get("default") if isinstance(kinds, dict) else kinds
        return str(found.get("_type") if isinstance(found, dict) else found)

    def left_float(self, layer: str) -> bool | None:
        """See `Format.left_float`."""
        skipped = self.settings.get("modules_to_not_convert")
        return within(layer, skipped) or layer.endswith("lm_head")

    def _described(self, layer: str) -> tuple[str, dict[str, Any]]:
        """Returns the kind of a layer's weight, and its attributes."""
        try:
            found = json.loads(self.header[f"{layer}.weight"])
            return str(found["_type"]), dict(found["_data"])
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise UnreadableError("the header of its file does not describe its weight") from error

    def _require_blocks(self, data: dict[str, Any], scale: Tensor, codes: Tensor) -> None:
        block = data.get("block_size")
        if not isinstance(block, list) or not block or type(block[-1]) is not int:
            raise UnreadableError("the header of its file has no block_size")
        require_groups(scale.view(1, 1) if scale.ndim < 2 else scale, codes.shape[1], block[-1])


def _target_bits(data: dict[str, Any]) -> int:
    """Returns the bits of a type such as int4, which is int8 where none is named."""
    target = data.get("target_dtype") or {}
    name = str(target.get("_data", "int8")) if isinstance(target, dict) else ""
    if name[:3] != "int" or name[3:] not in "12345678":
        raise UnreadableError(f"its target_dtype {name[:20]!r} is not read")
    return int(name[3:])

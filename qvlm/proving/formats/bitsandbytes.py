"""bitsandbytes, as transformers saves it: NF4 and FP4 in blocks, int8 in rows.

Four bits: `weight` holds two codes a byte, the first in the high half, in blocks of the flattened
weight with an absmax each, which may be codes of 8 bits themselves. `quant_state` is JSON in bytes.
Eight bits: `weight` is int8, and `SCB` holds the absmax of each row, 127 times its scale.

Source: https://github.com/bitsandbytes-foundation/bitsandbytes, version 0.50.
"""

import json
from typing import Any

import torch
from torch import Tensor

from qvlm.proving.formats.base import Format, number, within
from qvlm.proving.stored import StoredWeight, UnreadableError, shown

_STATES = ("nf4", "fp4")


class BitsAndBytes(Format):
    """A checkpoint of bitsandbytes."""

    name = "bitsandbytes"
    suffixes = (
        *(f".weight.quant_state.bitsandbytes__{kind}" for kind in _STATES),
        *(".weight.absmax", ".weight.quant_map", ".SCB"),
    )
    carriers = (
        *(".weight", ".weight_format"),
        *(".weight.nested_absmax", ".weight.nested_quant_map"),
    )

    def read(self, layer: str) -> StoredWeight:
        """See `Format.read`."""
        if layer + ".SCB" in self.tensors:
            return self._int8(layer)
        state = self._state(layer)
        shape, size = state.get("shape"), number(state, "blocksize")
        if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
            raise UnreadableError("its quant_state has no shape")
        codes = _halves(self.tensor(layer, ".weight"))
        count = int(torch.tensor(shape).prod())
        if codes.numel() != count + count % 2:
            raise UnreadableError(f"it holds {codes.numel()} codes for {count} weights")
        absmax, outer = self._absmax(layer, state)
        if absmax.numel() != -(-count // size):
            raise UnreadableError(f"it has {absmax.numel()} absmax values for {count} weights")
        codes = codes[:count]
        short = -count % size
        return StoredWeight(
            shape=tuple(shape),
            bits=4,
            claimed_bits=4 if self.settings.get("load_in_4bit") else 8,
            codes=torch.cat([codes, codes[-1:].expand(short)]).view(-1, size),
            scale=absmax,
            levels=self._levels(layer, ".weight.quant_map", 16),
            outer=outer,
            signed=outer is not None,
        )

    def claim(self) -> str:
        """See `Format.claim`."""
        if not self.settings.get("load_in_4bit"):
            return "8 bits"
        return f"4 bits, {self.settings.get('bnb_4bit_quant_type')}"

    def left_float(self, layer: str) -> bool | None:
        """See `Format.left_float`."""
        skipped = self.settings.get("llm_int8_skip_modules") or ["lm_head"]
        return within(layer, skipped) or layer.endswith("lm_head")

    def _int8(self, layer: str) -> StoredWeight:
        weight, absmax = self.tensor(layer, ".weight"), self.tensor(layer, ".SCB")
        if weight.dtype != torch.int8 or weight.ndim != 2 or absmax.shape != weight.shape[:1]:
            raise UnreadableError(f"its weight is {weight.dtype} with SCB of {shown(absmax)}")
        return StoredWeight(
            shape=tuple(weight.shape),
            bits=8,
            claimed_bits=4 if self.settings.get("load_in_4bit") else 8,
            codes=(weight.to(torch.int16) + 128).to(torch.uint8),
            scale=absmax / 127,
            fixed_zero=128,
        )

    def _state(self, layer: str) -> dict[str, Any]:
        kind = self.settings.get("bnb_4bit_quant_type")
        stored = self.tensor(layer, f".weight.quant_state.bitsandbytes__{kind}")
        try:
            state = json.loads(bytes(stored.tolist()))
        except (ValueError, RecursionError, TypeError) as error:
            raise UnreadableError(f"its quant_state is not JSON ({error})") from error
        if not isinstance(state, dict):
            raise UnreadableError("its quant_state is not an object of JSON")
        return state

    def _absmax(self, layer: str, state: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Returns the absmax of each block, and the nested ones that it is made of."""
        absmax = self.tensor(layer, ".weight.absmax")
        if absmax.dtype != torch.uint8:
            return absmax, None
        nested = self.tensor(layer, ".weight.nested_absmax")
        size, offset = number(state, "nested_blocksize"), state.get("nested_offset")
        if not isinstance(offset, float) or nested.numel() != -(-absmax.numel() // size):
            raise UnreadableError("its nested absmax values do not fit its quant_state")
        levels = self._levels(layer, ".weight.nested_quant_map", 256)
        factor = nested.repeat_interleave(size)[: absmax.numel()]
        return levels[absmax.long()] * factor + offset, nested

    def _levels(self, layer: str, suffix: str, count: int) -> Tensor:
        levels = self.tensor(layer, suffix)
        if levels.shape != (count,):
            raise UnreadableError(f"its {suffix.rpartition('.')[2]} has shape {shown(levels)}")
        return levels.float()


def _halves(weight: Tensor) -> Tensor:
    """The codes of bytes that hold two each, the first in the high half, whatever their type."""
    stored = weight.contiguous().view(torch.uint8).flatten()
    return torch.stack([stored >> 4, stored & 15], dim=1).flatten()

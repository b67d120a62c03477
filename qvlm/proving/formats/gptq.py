"""GPTQ, as AutoGPTQ and GPTQModel save it.

`qweight` [in bits / 32, out] packs codes along the input, `qzeros` [groups, out bits / 32] zero
points along the output, both in int32 words, lowest bit first. Zero points are stored minus one
(modulo 2^bits), unless `checkpoint_format` is "gptq_v2". `g_idx` [in] is the group of each input.

Source: https://github.com/AutoGPTQ/AutoGPTQ, version 0.7, `qlinear_cuda_old.py`.
"""

import torch
from torch import Tensor

from qvlm.proving.formats.base import Format, matches, number, within
from qvlm.proving.stored import (
    StoredWeight,
    UnreadableError,
    by_scale,
    require_groups,
    shown,
    unpacked,
)


class Gptq(Format):
    """A checkpoint of AutoGPTQ or GPTQModel."""

    name = "gptq"
    suffixes = (".qweight", ".qzeros", ".scales", ".g_idx")

    def read(self, layer: str) -> StoredWeight:
        """See `Format.read`."""
        bits = self._bits(layer)
        qweight, scales = self.tensor(layer, ".qweight"), self.tensor(layer, ".scales")
        if qweight.dtype != torch.int32 or qweight.ndim != 2 or scales.ndim != 2:
            raise UnreadableError(f"its qweight is {qweight.dtype} of shape {shown(qweight)}")
        if scales.shape[1] != qweight.shape[1]:
            raise UnreadableError(f"scales of {shown(scales)} do not fit {shown(qweight)} words")
        width, order = self._order(layer, qweight.shape[0] * 32 // bits)
        stored = qweight.shape[0] * 32 // width
        if not 2 <= stored <= 8:
            raise UnreadableError(f"qweight has {qweight.shape[0]} words for {width} inputs")
        codes = unpacked(qweight.T, stored, width, "qweight")[:, order]
        zeros = unpacked(self.tensor(layer, ".qzeros"), bits, scales.shape[1], "qzeros")
        require_groups(scales.T, width, number(self.settings, "group_size"))
        if zeros.shape != scales.shape:
            raise UnreadableError(f"zero points of {shown(zeros)} for scales of {shown(scales)}")
        first = 0 if self.settings.get("checkpoint_format") == "gptq_v2" else 1
        return StoredWeight(
            shape=tuple(codes.shape),
            bits=stored,
            claimed_bits=bits,
            codes=by_scale(codes, scales.T),
            scale=scales.T.flatten(),
            zero_point=(zeros.T.flatten().to(torch.int16) + first) % 2**bits,
        )

    def claim(self) -> str:
        """See `Format.claim`."""
        return f"{self.settings.get('bits')} bits in groups of {self.settings.get('group_size')}"

    def left_float(self, layer: str) -> bool | None:
        """See `Format.left_float`."""
        if any(rule[:2] == "-:" and matches(rule[2:], layer) for rule in self._rules()):
            return True
        return True if within(layer, self.settings.get("modules_to_not_convert")) else None

    def _rules(self) -> dict[str, object]:
        """GPTQModel's `dynamic`: settings by patterns of names; "-:" leaves layers float."""
        rules = self.settings.get("dynamic")
        return rules if isinstance(rules, dict) else {}

    def _bits(self, layer: str) -> int:
        bits = self._claimed_bits(layer)
        if not 2 <= bits <= 8:
            raise UnreadableError(f"bits is {bits} in its configuration")
        return bits

    def _claimed_bits(self, layer: str) -> int:
        for rule, changed in self._rules().items():
            positive = rule[:2] != "-:" and matches(rule.removeprefix("+:"), layer)
            if positive and isinstance(changed, dict) and "bits" in changed:
                return number(changed, "bits")
        return number(self.settings, "bits")

    def _order(self, layer: str, packed: int) -> tuple[int, Tensor]:
        """Returns the number of inputs, and their order by groups.

        Raises:
            UnreadableError: If `g_idx` does not put as many inputs into each group as claimed.
        """
        groups = self.optional(layer, ".g_idx")
        if groups is None:
            return packed, torch.arange(packed)
        width, size = len(groups), number(self.settings, "group_size")
        order = groups.sort(stable=True).indices
        expected = torch.arange(width) // (size if size > 0 else width)
        if not torch.equal(groups[order].long(), expected):
            raise UnreadableError("g_idx does not put its inputs into groups of the claimed size")
        return width, order

"""AutoAWQ in its GEMM version.

`qweight` [in, out / 8] and `qzeros` [groups, out / 8] pack 8 codes of 4 bits into an int32 word in
an order of their own, `scales` [groups, out].

Source: https://github.com/casper-hansen/AutoAWQ, version 0.2.9, `modules/linear/gemm.py`.
"""

import torch
from torch import Tensor

from qvlm.proving.formats.base import Format, number, within
from qvlm.proving.stored import (
    StoredWeight,
    UnreadableError,
    by_scale,
    require_groups,
    shown,
    unpacked,
)

_BITS = 4
# The output that each place of a word holds, lowest bits first.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Awq(Format):
    """A checkpoint of AutoAWQ."""

    name = "awq"
    suffixes = (".qweight", ".qzeros", ".scales")

    def read(self, layer: str) -> StoredWeight:
        """See `Format.read`."""
        version = str(self.settings.get("version", "gemm")).lower()
        if version != "gemm":
            raise UnreadableError(f"version {version!r} of AWQ's layout is not read")
        qweight, scales = self.tensor(layer, ".qweight"), self.tensor(layer, ".scales")
        if qweight.dtype != torch.int32 or qweight.ndim != 2 or scales.ndim != 2:
            raise UnreadableError(f"its qweight is {qweight.dtype} of shape {shown(qweight)}")
        zeros = _in_order(self.tensor(layer, ".qzeros"), scales.shape[1], "qzeros")
        codes = _in_order(qweight, scales.shape[1], "qweight").T
        group_size = number(self.settings, "group_size", "q_group_size")
        require_groups(scales.T, codes.shape[1], group_size)
        if zeros.shape != scales.shape:
            raise UnreadableError(f"zero points of {shown(zeros)} for scales of {shown(scales)}")
        return StoredWeight(
            shape=tuple(codes.shape),
            bits=_BITS,
            claimed_bits=number(self.settings, "bits", "w_bit"),
            codes=by_scale(codes, scales.T),
            scale=scales.T.flatten(),
            zero_point=zeros.T.flatten(),
        )

    def claim(self) -> str:
        """See `Format.claim`."""
        size = self.settings.get("group_size", self.settings.get("q_group_size"))
        return f"{self.settings.get('bits', self.settings.get('w_bit'))} bits in groups of {size}"

    def left_float(self, layer: str) -> bool | None:
        """See `Format.left_float`."""
        return True if within(layer, self.settings.get("modules_to_not_convert")) else None


def _in_order(packed: Tensor, count: int, what: str) -> Tensor:
    """Unpacks words [rows, count / 8] into codes [rows, count]."""
    codes = unpacked(packed, _BITS, count, what)
    places = torch.empty(8, dtype=torch.long)
    places[torch.tensor(_ORDER)] = torch.arange(8)
    return codes.unflatten(1, (-1, 8))[:, :, places].flatten(1)

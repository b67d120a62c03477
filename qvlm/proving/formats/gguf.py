"""GGUF, the format of llama.cpp: a file whose tensors each have a type of their own."""

from collections import Counter

from qvlm.proving.formats.base import Format
from qvlm.proving.formats.gguf_types import KINDS
from qvlm.proving.gguf import BLOCKS, GgufFile
from qvlm.proving.stored import StoredWeight, UnreadableError

_FLOATS = (0, 1, 28, 30)
_WEIGHT = ".weight"
# Bits that most weights of a file have, by llama.cpp's number of its type.
_FILE_TYPES = {
    **{2: 4, 3: 4, 7: 8, 8: 5, 9: 5, 10: 2, 11: 3, 12: 3, 13: 3},
    **{14: 4, 15: 4, 16: 5, 17: 5, 18: 6, 21: 2, 25: 4},
}


class Gguf(Format):
    """A GGUF file."""

    name = "gguf"
    tensors: GgufFile

    def __init__(self, tensors: GgufFile) -> None:
        super().__init__(tensors, tensors.settings)

    def layers(self) -> list[str]:
        """See `Format.layers`."""
        infos = self.tensors.infos.items()
        return [name.removesuffix(_WEIGHT) for name, info in infos if info.kind not in _FLOATS]

    def owned(self, layer: str) -> set[str]:
        """See `Format.owned`."""
        return {layer + _WEIGHT, layer} & self.tensors.keys()

    def read(self, layer: str) -> StoredWeight:
        """See `Format.read`."""
        name = layer + _WEIGHT if layer + _WEIGHT in self.tensors else layer
        info = self.tensors.infos[name]
        if info.kind not in KINDS:
            raise UnreadableError(f"GGUF's type {info.kind} is not read")
        if len(info.shape) not in (2, 3) or info.shape[-1] % BLOCKS[info.kind][0]:
            raise UnreadableError(f"its shape {list(info.shape)} does not fit its type")
        kind = KINDS[info.kind]
        blocks = kind.read(self.tensors[name])
        return StoredWeight(
            shape=info.shape,
            bits=kind.bits,
            claimed_bits=kind.bits,
            codes=blocks.codes,
            scale=blocks.scale,
            fixed_zero=blocks.zero,
            levels=blocks.levels,
            minimum=None if blocks.minimum is None else -blocks.minimum,
            outer=blocks.outer,
            signed=True,
        )

    def claim(self) -> str:
        """See `Format.claim`."""
        bits = self._claimed_bits()
        kinds = {info.kind for info in self.tensors.infos.values()} & KINDS.keys()
        names = ", ".join(sorted(KINDS[kind].name for kind in kinds))
        return f"mostly {bits} bits ({names})" if bits else names

    def faults(self) -> list[str]:
        """See `Format.faults`."""
        bits, taken = self._claimed_bits(), self._bits_of_most()
        parts, said = self.settings.get("split.count"), []
        if type(parts) is int and parts > 1:
            part = self.settings.get("split.no", 0) + 1
            said.append(f"it is part {part} of {parts}, and the other parts are not read")
        if bits is None or taken in (bits, None):
            return said
        return [*said, f"most weights of the file are said to have {bits} bits, and have {taken}"]

    def _claimed_bits(self) -> int | None:
        file_type = self.settings.get("general.file_type")
        return _FILE_TYPES.get(file_type) if type(file_type) is int else None

    def _bits_of_most(self) -> int | None:
        """Returns the bits of most of the weights in layers, 16 for those in floating point."""
        found: Counter[int] = Counter()
        for name, info in self.tensors.infos.items():
            if len(info.shape) > 1 and ".blk." in f".{name}":
                known = KINDS.get(info.kind)
                count = 1
                for size in info.shape:
                    count *= size
                found[known.bits if known else 16] += count
        return found.most_common(1)[0][0] if found else None

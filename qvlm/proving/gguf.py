"""Reads the header of a GGUF file, and maps its tensors.

A file is: magic, version, numbers of tensors and of keys, the keys with their values, the tensors'
names, sizes, types and offsets, and then their data, aligned. All numbers are little-endian.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3. Left out: files
that are split into several, and files of big-endian machines.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qvlm.errors import UserError

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
# struct's letter for each type of a value.
_NUMBERS = {
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"},
    **{10: "Q", 11: "q", 12: "d"},
}
_FLOATS = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
_MOST = 2**24  # keys, tensors and items of a list
# Number of weights and of bytes in a block of each type.
BLOCKS = {
    **{2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 20: (32, 18)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210)},
}


class Info(NamedTuple):
    """A tensor of a file: its shape with the fastest dimension last, its type and its offset."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class GgufFile(Mapping[str, Tensor]):
    """The tensors of a file by name. Quantized ones are bytes, [blocks, bytes of a block] uint8.

    Args:
        path: File.

    Attributes:
        settings: Value of each key.
        infos: What the header says of each tensor.

    Raises:
        UserError: If it is not such a file, or is truncated.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
            self._at = 0
            self._read_header()
        except (struct.error, ValueError, OSError, OverflowError, RecursionError) as error:
            raise UserError(f"{path} is not a whole GGUF file: {error}.") from error

    def __getitem__(self, name: str) -> Tensor:
        info = self.infos[name]
        start, size = self._start + info.offset, self._size(info)
        content = torch.from_numpy(np.array(self._bytes[start : start + size]))
        if info.kind in _FLOATS:
            return content.view(_FLOATS[info.kind]).view(info.shape)
        return content.view(-1, BLOCKS[info.kind][1]) if info.kind in BLOCKS else content

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def _read_header(self) -> None:
        if bytes(self._bytes[:4]) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version, tensors, keys = self._number("I"), self._number("Q"), self._number("Q")
        if version not in (2, 3) or max(tensors, keys) > _MOST:
            raise ValueError(f"version {version} is not read")
        self.settings = {self._text(): self._value(self._number("I")) for _ in range(keys)}
        self.infos: dict[str, Info] = {}
        for name, info in (self._info() for _ in range(tensors)):
            if name in self.infos:
                raise ValueError(f"the tensor {name} is there twice")
            self.infos[name] = info
        alignment = self.settings.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError("its alignment is not a whole number")
        self._start = -(-self._at // alignment) * alignment
        for name, info in self.infos.items():
            if self._start + info.offset + self._size(info) > len(self._bytes):
                raise ValueError(f"the tensor {name} ends beyond the end of the file")

    def _info(self) -> tuple[str, Info]:
        name = self._text()
        sizes = [self._number("Q") for _ in range(min(self._number("I"), 8))]
        return name, Info(tuple(reversed(sizes)), self._number("I"), self._number("Q"))

    def _size(self, info: Info) -> int:
        """Bytes of a tensor; 0 where the type is not read."""
        count = math.prod(info.shape)
        if info.kind in _FLOATS:
            return count * _FLOATS[info.kind].itemsize
        weights, size = BLOCKS.get(info.kind, (1, 0))
        if count % weights:
            raise ValueError(f"{count} weights are not whole blocks")
        return count // weights * size

    def _number(self, letter: str) -> Any:
        form = "<" + letter
        end = self._at + struct.calcsize(form)
        (found,) = struct.unpack(form, self._bytes[self._at : end].tobytes())
        self._at = end
        return found

    def _text(self) -> str:
        length = self._number("Q")
        if length > len(self._bytes) - self._at:
            raise ValueError("a text ends beyond the end of the file")
        self._at += length
        return self._bytes[self._at - length : self._at].tobytes().decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._number(_letter(kind))
        kind, count = self._number("I"), self._number("Q")
        if count > _MOST or kind == _ARRAY:
            raise ValueError("a list is too long or nested")
        if kind == _STRING:
            return [self._text() for _ in range(count)]
        self._at += count * struct.calcsize("<" + _letter(kind))  # no list of numbers is needed
        return None


def _letter(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"a value of type {kind} is not known")
    return _NUMBERS[kind]

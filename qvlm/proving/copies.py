"""Layers, or experts of one tensor, that hold what another one holds."""

import hashlib

import torch
from torch import Tensor

from qvlm.proving.checks import ENOUGH_SCALES
from qvlm.proving.stored import StoredWeight


class Copies:
    """Remembers the codes and scales of layers by their hashes, and finds the second of a pair."""

    def __init__(self) -> None:
        self._codes: dict[bytes, str] = {}
        self._scales: dict[bytes, str] = {}

    def faults(self, layer: str, weight: StoredWeight) -> list[str]:
        """Returns which earlier layer has the same codes, or the same scales with other codes.

        Args:
            layer: Name of the layer.
            weight: Its weight; the experts of a fused one are compared with each other as well.
        """
        experts = weight.shape[0] if len(weight.shape) == 3 else 1
        said = []
        parts = zip(weight.codes.chunk(experts), weight.scale.chunk(experts), strict=True)
        for index, (codes, scale) in enumerate(parts):
            name = layer if experts == 1 else f"{layer}[{index}]"
            said += self._part(name, codes, scale)
        return said

    def _part(self, name: str, codes: Tensor, scale: Tensor) -> list[str]:
        if not _varies(codes):
            return []
        first = self._codes.setdefault(_digest(codes), name)
        if first != name:
            return [f"its codes are those of {first}"]
        if len(scale) < ENOUGH_SCALES or not _varies(scale):
            return []
        first = self._scales.setdefault(_digest(scale), name)
        return [] if first == name else [f"its scales are those of {first}"]


def _varies(tensor: Tensor) -> bool:
    return bool((tensor != tensor.flatten()[0]).any())


def _digest(tensor: Tensor) -> bytes:
    content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()

"""What every peer has: a name, what keeps it from running, and a model that it can run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

# Takes the next rows of a sequence. Returns the output for each of them.
Step = Callable[[Any], Any]
# Begins a sequence.
Start = Callable[[], Step]


@dataclass(frozen=True)
class Loaded:
    """The weights of a model as a peer holds them.

    Attributes:
        weight_bytes: Bytes of the linears of one decoder layer, as they are stored.
        layer: Begins products of the linears of one decoder layer, or None. A step takes inputs
            [rows, in] by their width in the peer's type, and returns the output [rows, out] of each
            linear, in the order of the layer.
        model: Begins a sequence of the whole model, or None. A step takes embeddings
            [rows, hidden] in the peer's type, and returns the hidden states behind the last norm.
    """

    weight_bytes: int
    layer: Start | None = None
    model: Start | None = None


class Peer(ABC):
    """A library, or a part of one, that multiplies with quantized weights on a CPU.

    Attributes:
        name: Name in tables.
        bits: Bits of a weight, by which peers are ranked.
        dtype: Type of its inputs.
        packages: What to install, by the name of the module that must be there.
        is_ours: Whether it is our own, which the others are ranked against.
    """

    name: str
    bits: int
    dtype: torch.dtype = torch.bfloat16
    packages: ClassVar[Mapping[str, str]] = {}
    is_ours: bool = False

    def obstacle(self) -> str | None:
        """Returns why this peer cannot run here and what to do about it, or None."""
        absent = [package for module, package in self.packages.items() if not find_spec(module)]
        if not absent:
            return None
        be = "is" if len(absent) == 1 else "are"
        return f"{' and '.join(absent)} {be} not installed. Give `pip install {' '.join(absent)}`."

    def note(self) -> str | None:
        """Returns what a reader must know about the way it ran here, or None."""
        return None

    def versions(self) -> dict[str, str]:
        """Returns the version of each package that this peer needs."""
        return {package: _version(module, package) for module, package in self.packages.items()}

    @abstractmethod
    def load(self, model: LlamaForCausalLM, layers: int) -> Loaded:
        """Quantizes a model.

        Args:
            model: Model in bf16 with one decoder layer, which is left unchanged.
            layers: Number of decoder layers that its own model has, all of them copies of that one.
        """


def _version(module: str, package: str) -> str:
    """The version of a package, or what its module says if it was put there without metadata."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return str(getattr(import_module(module), "__version__", "of an unknown version"))


def rounded(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Rounds a weight to 4 bits around zero, as libraries do that leave this to the user.

    Args:
        weight: Weight [out, in].
        group_size: Number of neighboring weights that share a scale, a divisor of `in`.

    Returns:
        Codes [out, in] uint8 and scales [out, in / group_size] float32. A weight is about
        (code - 8) scale.
    """
    groups = weight.float().unflatten(1, (-1, group_size))
    scale = groups.abs().amax(2, keepdim=True).clamp(min=1e-8) / 7
    codes = (groups / scale).round().add(8).to(torch.uint8)
    return codes.flatten(1), scale.squeeze(2)

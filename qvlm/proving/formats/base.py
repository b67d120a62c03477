"""What a format tells of a checkpoint: its layers, the weight of each, and what it claims."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qvlm.proving.stored import StoredWeight, UnreadableError

# A repetition of a group, or many repetitions, can take for ever on a name.
_SLOW = re.compile(r"\)[*+{]|(?:[*+}].*){6}")
LONGEST_PATTERN = 300


class Format(ABC):
    """A quantized checkpoint in one format.

    Args:
        tensors: Tensors of the checkpoint by name.
        settings: The `quantization_config` of its config.json.

    Attributes:
        name: Name of the format.
        suffixes: Ends of the names of the tensors that only a quantized layer has.
        carriers: Ends of the names of tensors that belong to a layer which has one of `suffixes`.
    """

    name: str
    suffixes: tuple[str, ...] = ()
    carriers: tuple[str, ...] = ()

    def __init__(self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
        self.tensors = tensors
        self.settings = settings

    def layers(self) -> list[str]:
        """Returns the names of the quantized layers, in the order of the checkpoint."""
        return list(
            dict.fromkeys(
                name.removesuffix(suffix)
                for name in self.tensors
                for suffix in self.suffixes
                if name.endswith(suffix)
            )
        )

    def owned(self, layer: str) -> set[str]:
        """Returns the names of the tensors that store a quantized layer."""
        names = {layer + suffix for suffix in (*self.suffixes, *self.carriers)}
        return names & self.tensors.keys()

    @abstractmethod
    def read(self, layer: str) -> StoredWeight:
        """Reads the weight of a quantized layer.

        Raises:
            UnreadableError: If its tensors are incomplete or do not fit each other.
        """

    @abstractmethod
    def claim(self) -> str:
        """Returns what the checkpoint says of itself, such as "4 bits, groups of 128"."""

    def left_float(self, layer: str) -> bool | None:
        """Returns whether the checkpoint says that a linear is left in floating point.

        False says that it must be quantized. None leaves it to the layers around it.
        """
        return None

    def faults(self) -> list[str]:
        """Returns what is wrong with the checkpoint as a whole."""
        return []

    def tensor(self, layer: str, suffix: str) -> Tensor:
        """Reads a tensor of a layer.

        Raises:
            UnreadableError: If the layer lacks it.
        """
        if layer + suffix not in self.tensors:
            raise UnreadableError(f"its tensor {suffix.lstrip('.')} is missing")
        return self.tensors[layer + suffix]

    def optional(self, layer: str, suffix: str) -> Tensor | None:
        """Reads a tensor that a layer may lack."""
        return self.tensors.get(layer + suffix)


def matches(pattern: str, name: str) -> bool:
    """Whether a regular expression of a checkpoint matches the beginning of a name.

    Raises:
        UnreadableError: If it is not an expression, or one that could take for ever.
    """
    try:
        if len(pattern) > LONGEST_PATTERN or _SLOW.search(pattern):
            raise re.error("it may take for ever")
        return re.match(pattern, name) is not None
    except re.error as error:
        raise UnreadableError(f"the pattern {pattern[:60]!r} is not used: {error}") from error


def number(settings: Mapping[str, Any], *keys: str) -> int:
    """Returns the first of some keys of a configuration that is a whole number.

    Raises:
        UnreadableError: If none is.
    """
    for key in keys:
        if type(settings.get(key)) is int:
            return int(settings[key])
    raise UnreadableError(f"{keys[0]} in its configuration is not a whole number")


def within(name: str, parts: object) -> bool:
    """Whether one of the names of a list, which may be none, occurs in a name."""
    return isinstance(parts, list) and any(isinstance(part, str) and part in name for part in parts)

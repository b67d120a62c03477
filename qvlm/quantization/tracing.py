"""How a model calls its layers: with which arguments, and with whose outputs.

The layers of one kind are often called alike, each with the outputs of the one before. There are
exceptions. Some layers attend in windows and others do not, which gives them masks, positions or
lengths of their own (Gemma 3, the tower of Qwen2.5-VL). Or the model adds something between two
layers (the DeepStack features of Qwen3-VL). A walk that overlooked this would calibrate on inputs
that the model never has, without any sign. So the model is watched while it runs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.errors import UserError
from qvlm.quantization.calls import Call
from qvlm.quantization.hooks import hooked


class Caught(Exception):
    """Stops a forward pass once what is wanted of it is known."""


@dataclass(frozen=True)
class Trace:
    """How a model calls the layers of one kind; by default all alike.

    Attributes:
        calls: By name of a layer its calls, one per batch, without hidden states.
        joins: Layers that read something else than the outputs of the layer before.
    """

    calls: Mapping[str, list[Call]] = field(default_factory=dict)
    joins: frozenset[str] = frozenset()

    def alike(self, names: Iterable[str]) -> bool:
        """Whether each of these layers has the arguments of the first and the outputs before it."""
        traced = [name for name in names if name in self.calls]
        return not self.joins.intersection(traced[1:]) and all(
            _same(self.calls[name], self.calls[traced[0]]) for name in traced
        )

    def require_alike(self, names: Sequence[str]) -> None:
        """Refuses to join layers that differ into one block.

        Raises:
            UserError: If they are not alike.
        """
        if not self.alike(names):
            raise UserError(
                f"{names[0]} and {names[-1]} cannot be searched jointly, because the model calls "
                "them with different arguments. Choose a method that takes layer after layer."
            )

    def own(self, name: str, calls: list[Call]) -> list[Call]:
        """Returns calls with the hidden states of `calls` and the layer's own other arguments."""
        if self.alike(self.calls):
            return calls
        found: list[Call] = []
        for (args, kwargs), (more, options) in zip(calls, self.calls[name], strict=True):
            hidden = args[0] if args else kwargs["hidden_states"]
            found.append(((hidden, *more[1:]), {**options}) if more else _named(hidden, options))
        return found


@torch.no_grad()
def trace(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Tensor]]
) -> Trace:
    """Watches how a model calls layers, up to the last of them.

    Args:
        model: Model in evaluation mode.
        layers: Consecutive layers by name.
        batches: Keyword arguments of the model's forward, all of which reach the layers.
    """
    names = {layer: name for name, layer in layers.items()}
    first, last = next(iter(names), None), next(reversed(names), None)
    calls: dict[str, list[Call]] = {name: [] for name in layers}
    joins: set[str] = set()
    # The output of the layer before, and how often it had been written to.
    before: tuple[Any, int] = (None, 0)

    def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if layer is not first and (hidden is not before[0] or _version(hidden) != before[1]):
            joins.add(names[layer])
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        calls[names[layer]].append(((None, *args[1:]) if args else (), rest))

    def leave(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal before
        hidden = output[0] if isinstance(output, tuple) else output
        before = hidden, _version(hidden)
        if layer is last:
            raise Caught

    with hooked(dict.fromkeys(names, enter), dict.fromkeys(names, leave), with_kwargs=True):
        for batch in batches:
            try:
                model(**batch, use_cache=False)
            except Caught:
                before = None, 0
    return Trace(calls, frozenset(joins))


def _version(x: Tensor) -> int:
    """How often a tensor was written in place, as far as PyTorch counts that."""
    return 0 if x.is_inference() else x._version


def _named(hidden: Tensor, options: Mapping[str, Any]) -> Call:
    return (), {**options, "hidden_states": hidden}


def _same(some: Sequence[Call], others: Sequence[Call]) -> bool:
    return all(
        len(args) == len(more)
        and kwargs.keys() == options.keys()
        and all(map(_equal, args, more))
        and all(_equal(kwargs[key], options[key]) for key in kwargs)
        for (args, kwargs), (more, options) in zip(some, others, strict=True)
    )


def _equal(one: Any, other: Any) -> bool:
    """Whether two arguments are the same object, or equal if they are numbers or texts."""
    return one is other or (isinstance(one, int | float | str) and one == other)

"""The calls of a block: what it is run on, and what the next block is run on after it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call of a block, that of one calibration batch."""


class Chain(nn.ModuleList):
    """Consecutive layers as one block; all of them get the same further arguments."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Maps hidden states [batch, tokens, features] through one layer after the other."""
        for layer in self:
            hidden_states = _hidden(layer(hidden_states, *args, **kwargs))
        return hidden_states


@torch.no_grad()
def run_calls(module: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    """Runs a module on each call and returns its hidden states [batch, tokens, features]."""
    return [_hidden(module(*args, **kwargs)) for args, kwargs in calls]


def advance(module: nn.Module, calls: list[Call]) -> list[Call]:
    """Computes the next layer's calls: the same with this layer's outputs as hidden states.

    Empties `calls` on the way, so that old and new activations are not in memory all at once.
    """
    following: list[Call] = []
    while calls:
        args, kwargs = calls.pop(0)
        output = run_calls(module, [(args, kwargs)])[0]
        if args:
            following.append(((output, *args[1:]), kwargs))
        else:
            following.append(((), {**kwargs, "hidden_states": output}))
    return following


def _hidden(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The hidden states of a layer that returns them alone or first in a tuple."""
    return outputs[0] if isinstance(outputs, tuple) else outputs

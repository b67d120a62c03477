"""A trace notices whatever happens to hidden states between two layers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qvlm.quantization.tracing import trace


class Between(nn.Module):
    """Two layers, and something done to the hidden states between them."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.change = change

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        hidden = self.layers[0](x)
        if self.change == "another tensor":
            hidden = hidden + 1
        elif self.change == "in place":
            hidden.add_(1)
        elif self.change == "in a part":
            hidden[:, 0] += 1
        return self.layers[1](hidden)


@pytest.mark.parametrize("change", ["nothing", "another tensor", "in place", "in a part"])
def test_a_change_between_layers_joins(change: str) -> None:
    model = Between(change)
    layers = {f"layers.{index}": layer for index, layer in enumerate(model.layers)}
    with torch.no_grad():
        found = trace(model, layers, [{"x": torch.ones(2, 3, 4)}] * 2)
    assert found.joins == (frozenset() if change == "nothing" else frozenset({"layers.1"}))

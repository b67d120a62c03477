"""Hooks act while their context is open, and are gone afterwards whatever happened."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qvlm.quantization.hooks import hooked


def test_hooks_see_and_replace_inputs_and_outputs() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    x = torch.randn(2, 3)
    plain = second(first(x))
    seen: list[Tensor] = []

    def double(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (2 * args[0],)

    with hooked({first: double}, {second: lambda module, args, output: seen.append(output)}):
        doubled = second(first(x))
    torch.testing.assert_close(doubled, second(first(2 * x)))
    assert torch.equal(seen[0], doubled) and len(seen) == 1
    assert torch.equal(second(first(x)), plain)


def test_keyword_arguments_reach_hooks_that_ask_for_them() -> None:
    seen: list[dict[str, Any]] = []
    module = nn.Identity()
    with hooked({module: lambda module, args, kwargs: seen.append(kwargs)}, with_kwargs=True):
        module(input=torch.ones(1))
    assert list(seen[0]) == ["input"]


@pytest.mark.parametrize("where", ["before", "after"])
def test_hooks_are_gone_after_an_error(where: str) -> None:
    module = nn.Linear(2, 2)

    def fail(*args: Any) -> None:
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"), hooked(**{where: {module: fail}}):
        module(torch.ones(1, 2))
    assert module(torch.ones(1, 2)).shape == (1, 2)

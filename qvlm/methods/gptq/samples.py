"""What the linears of a block read, and how much each token counts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.quantization.block import Block
from qvlm.quantization.calls import run_calls
from qvlm.quantization.hooks import hooked
from qvlm.quantization.precision import settled
from qvlm.quantization.quantizer import Quantizer, UniformQuantizer


@dataclass(frozen=True)
class Samples:
    """Calibration inputs of one linear.

    Attributes:
        tokens: Inputs [tokens, in].
        weights: Weight of each token, [tokens] float64; None weighs all alike.
    """

    tokens: Tensor
    weights: Tensor | None = None

    def gram(self, inputs: Quantizer) -> Tensor:
        """Computes the weighted gram matrix of quantized inputs, [in, in] float64.

        Args:
            inputs: Quantizer of the inputs. If it folds its scales into the weight, inputs are in
                steps of the scale, as the weight expects them.
        """
        if isinstance(inputs, UniformQuantizer) and inputs.folds:
            seen = inputs.centered(self.tokens).double()
        else:
            seen = inputs(self.tokens).double()
        weighted = seen if self.weights is None else seen * self.weights[:, None]
        return weighted.T @ seen


def collect(
    block: Block,
    names: Sequence[str],
    max_tokens: int,
    weights: Sequence[Tensor] | None = None,
) -> dict[str, Samples]:
    """Runs a block as it is now and collects what some of its linears read.

    An expert reads the tokens that are routed to it, perhaps none. Their weights are found by
    looking the expert's inputs up among those of the mixture, of which they are copies.

    Args:
        block: Block of a walk.
        names: Names of the linears in the block.
        max_tokens: Approximate number of tokens to keep per linear, evenly spaced in every call.
        weights: Weight of each token of each call, [tokens]. None weighs all alike.

    Returns:
        Samples of each linear, in the order of `names`; see `Block.linear_inputs` for their type.
    """
    share = -(-max_tokens // max(1, len(block.inputs)))
    kept: dict[str, list[tuple[Tensor, Tensor | None]]] = {name: [] for name in names}
    modules = {name: block.module.get_submodule(name) for name in names}
    # Inputs of the modules around these linears in the current call, [tokens, features].
    around: dict[str, Tensor] = {}
    of_call: Tensor | None = None

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = args[0] if args else kwargs.get("hidden_states")
            if isinstance(first, Tensor) and first.ndim > 1:
                around[name] = first.detach().flatten(0, -2)

        return hook

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            tokens = args[0].detach().flatten(0, -2)
            weight = None
            if of_call is not None:
                weight = _weights_of(name, len(tokens), around, of_call)
            if (first := block.first_positions(args[0])) is not None:
                tokens, weight = tokens[~first], None if weight is None else weight[~first]
            rows = block.kept_tokens(tokens, share)
            weight = None if weight is None else weight[rows]
            kept[name].append((settled(tokens[rows]).to(tokens.dtype), weight))

        return hook

    parents = {} if weights is None else _parents(block.module, names)
    with (
        hooked({module: note(name) for name, module in parents.items()}, with_kwargs=True),
        hooked({module: keep(name) for name, module in modules.items()}),
    ):
        for index, call in enumerate(block.inputs):
            around.clear()
            of_call = None if weights is None else weights[index]
            run_calls(block.module, [call])
    found = {}
    for name, parts in kept.items():
        linear = block.linears[name]
        tokens = [part for part, _ in parts] or [linear.weight.new_empty(0, linear.in_features)]
        counts = [weight for _, weight in parts if weight is not None]
        found[name] = Samples(torch.cat(tokens), torch.cat(counts) if counts else None)
    return found


def _parents(module: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that contain some of these linears, by name."""
    paths = {
        ".".join(name.split(".")[:end]) for name in names for end in range(name.count(".") + 1)
    }
    return {path: module.get_submodule(path) for path in sorted(paths)}


def _weights_of(name: str, count: int, around: dict[str, Tensor], weights: Tensor) -> Tensor:
    """Weights [count] of the tokens that a linear reads in a call whose tokens have `weights`."""
    if count == len(weights):
        return weights
    parts = name.split(".")
    inputs = [around.get(".".join(parts[:end])) for end in range(len(parts) - 1, -1, -1)]
    expert = next(x for x in inputs if x is not None and len(x) == count)
    mixture = next(x for x in inputs if x is not None and len(x) == len(weights))
    keys, order = _row_keys(mixture).sort(stable=True)
    return weights[order[torch.searchsorted(keys, _row_keys(expert)).clamp_max(len(keys) - 1)]]


def _row_keys(x: Tensor) -> Tensor:
    """A number for each row of x [rows, features], equal for rows of equal bits, int64."""
    bits = x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    random = torch.Generator().manual_seed(0)
    factors = torch.randint(2**62, (x.shape[1],), generator=random) * 2 + 1
    return (bits.long() * factors.to(x.device)).sum(1)

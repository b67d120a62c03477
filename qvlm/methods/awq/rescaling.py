"""Channels of a block that can be rescaled without a change of what the block computes.

If an op produces channels that only linear maps read, the op's channels can be divided by s and the
columns of every reader multiplied by s: W x = (W diag(s)) (diag(s)^-1 x). There are two kinds:

- A norm and everything that reads its output: query, key and value; gate and up; all experts of a
  mixture and their router, which reads the same channels but is not quantized.
- A linear in front of a linear with only channel-wise products in between: value before attention
  output, up before down. With grouped-query attention, value and output differ in width and are
  left out.

Running the block shows which linears read a norm: those whose inputs are the norm's outputs.
Experts count together, so that an expert without a token is included. Then every rescaling is
tried with powers of two, which are exact in floating point, and taken only if the block's outputs
stay equal to the bit. So an activation function in between, a norm that adds one to its weight, or
an unknown further reader rules a rescaling out and does no harm.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.quantization.block import Block
from qvlm.quantization.hooks import hooked

# For each linear the linear beside it that feeds it, by the names that transformers uses.
SOURCES = {
    "o_proj": "v_proj",
    "out_proj": "v_proj",
    "dense": "v_proj",
    "down_proj": "up_proj",
}

# Number of tokens that are looked up in a norm's output to recognize one of its readers.
_PROBE_TOKENS = 4


@dataclass(frozen=True)
class Rescaling:
    """Channels that can be rescaled; all names are relative to the block.

    Attributes:
        source: Name of the norm or linear that produces the channels.
        readers: Names of the linears to be quantized that read the channels.
        routers: Names of further modules that read them and stay in floating point.
        width: Number of channels.
    """

    source: str
    readers: tuple[str, ...]
    routers: tuple[str, ...]
    width: int

    @torch.no_grad()
    def apply(self, block: nn.Module, scale: Tensor) -> None:
        """Divides the produced channels by `scale` [width] and multiplies the readers' columns.

        Source and readers must be the float modules.
        """
        source = block.get_submodule(self.source)
        for part in ("weight", "bias"):
            tensor = getattr(source, part, None)
            if isinstance(tensor, Tensor):
                rows = scale.view(-1, *[1] * (tensor.ndim - 1))
                tensor.copy_(tensor.float() / rows)
        for name in (*self.readers, *self.routers):
            weight = block.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight.copy_(weight.float() * scale)


def find_rescalings(block: Block) -> list[Rescaling]:
    """Finds the rescalings of a block whose linears are all in floating point.

    Returns:
        Rescalings in the execution order of their readers; none for a block that no calibration
        batch reaches.
    """
    if not block.inputs:
        return []
    found = [
        rescaling
        for rescaling in (*_behind_norms(block), *_behind_linears(block))
        if _keeps_function(block, rescaling)
    ]
    order = list(block.linears)
    return sorted(found, key=lambda rescaling: min(map(order.index, rescaling.readers)))


def _behind_norms(block: Block) -> list[Rescaling]:
    norms = {name: m for name, m in _leaves(block.module).items() if _weight_ndim(m) == 1}
    maps = {name: m for name, m in _leaves(block.module).items() if _weight_ndim(m) == 2}
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def keep(seen: dict[str, Tensor], name: str, rows: slice) -> Callable[[Any], None]:
        def note(tensor: Any) -> None:
            if isinstance(tensor, Tensor):
                seen[name] = tensor.detach().flatten(0, -2)[rows].clone()

        return note

    def after(note: Callable[[Any], None]) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: note(output)

    def before(note: Callable[[Any], None]) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: note(args[0] if args else None)

    few = slice(_PROBE_TOKENS)
    with hooked(
        {module: before(keep(inputs, name, few)) for name, module in maps.items()},
        {module: after(keep(outputs, name, slice(None))) for name, module in norms.items()},
    ):
        block.run(calls=block.inputs[:1])

    rescalings = []
    for norm, produced in outputs.items():
        kinds = {_kind(name) for name, read in inputs.items() if _among(read, produced)}
        members = [name for name in maps if _kind(name) in kinds]
        readers = tuple(name for name in block.linears if name in members)
        routers = tuple(name for name in members if name not in block.linears)
        if readers:
            rescalings.append(Rescaling(norm, readers, routers, produced.shape[1]))
    return rescalings


def _behind_linears(block: Block) -> list[Rescaling]:
    rescalings = []
    for name, linear in block.linears.items():
        parent, dot, child = name.rpartition(".")
        source = parent + dot + SOURCES.get(child, "")
        if source in block.linears and block.linears[source].out_features == linear.in_features:
            rescalings.append(Rescaling(source, (name,), (), linear.in_features))
    return rescalings


def _keeps_function(block: Block, rescaling: Rescaling) -> bool:
    """Whether the block's outputs stay equal to the bit when channels scale by powers of two."""
    parts = [
        block.module.get_submodule(name)
        for name in (rescaling.source, *rescaling.readers, *rescaling.routers)
    ]
    saved = [{key: value.clone() for key, value in part.state_dict().items()} for part in parts]
    weight = parts[0].weight
    assert isinstance(weight, Tensor)
    channels = torch.arange(rescaling.width, device=weight.device)
    try:
        rescaling.apply(block.module, torch.exp2(channels * 7 % 5 - 2))
        outputs = block.run()
    finally:
        for part, state in zip(parts, saved, strict=True):
            part.load_state_dict(state)
    return all(map(torch.equal, outputs, block.float_outputs()))


def _leaves(module: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in module.named_modules() if not any(m.children())}


def _weight_ndim(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    return weight.ndim if isinstance(weight, Tensor) else 0


def _kind(name: str) -> str:
    """The name without the numbers of experts: all experts read what one of them reads."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _among(rows: Tensor, table: Tensor) -> bool:
    """Whether each of the rows is a row of the table; both are [tokens, features]."""
    if len(rows) == 0 or rows.shape[1] != table.shape[1]:
        return False
    return bool((rows[:, None] == table).all(2).any(1).all())

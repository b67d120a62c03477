"""Where a block lets channels be rescaled without changing what it computes.

If an op produces channels that only linear maps read, then dividing the op's channels by s and
multiplying the columns of every reader by s changes nothing: W x = (W diag(s)) (diag(s)^-1 x). Two
kinds of such places are looked for:

- a norm and everything that reads its output: query, key and value; gate and up; all experts of a
  mixture, and with them the router, which reads the same channels but is not quantized;
- a linear before a linear with only channel-wise products between: value before the attention
  output, up before down. With grouped-query attention the former do not match in size and are left.

Who reads a norm is found by running the block and seeing which inputs are the norm's outputs;
experts count together, so that one without a token is not forgotten. Then each place is tried: it
is rescaled by powers of two, which are exact in floating point, and taken only if the block's
outputs stay the same to the bit. So an activation function in between, a norm that adds one to its
weight or an unknown further reader cannot do harm: that place is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.quantization.block import Block

# Linear to the linear beside it that feeds it, by the names that transformers uses.
SOURCES = {
    "o_proj": "v_proj",
    "out_proj": "v_proj",
    "dense": "v_proj",
    "down_proj": "up_proj",
}

# Tokens that are looked up in a norm's output to recognise one of its readers.
_PROBE_TOKENS = 4


@dataclass(frozen=True)
class Fold:
    """One place where channels can be rescaled.

    Attributes:
        source: the norm or linear that produces the channels, by name relative to the block.
        readers: the linears to be quantized that read them.
        routers: further modules that read them and stay in floating point.
        width: how many channels.
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


def find_folds(block: Block) -> list[Fold]:
    """The places of a block, before any of its linears is replaced, in execution order of readers.

    Empty for a block that no calibration batch reaches.
    """
    if not block.inputs:
        return []
    found = [
        fold
        for fold in (*_behind_norms(block), *_behind_linears(block))
        if _keeps_function(block, fold)
    ]
    order = list(block.linears)
    return sorted(found, key=lambda fold: min(map(order.index, fold.readers)))


def _behind_norms(block: Block) -> list[Fold]:
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
    hooks = [
        module.register_forward_hook(after(keep(outputs, name, slice(None))))
        for name, module in norms.items()
    ]
    hooks += [
        module.register_forward_pre_hook(before(keep(inputs, name, few)))
        for name, module in maps.items()
    ]
    try:
        block.run(calls=block.inputs[:1])
    finally:
        for hook in hooks:
            hook.remove()

    folds = []
    for norm, produced in outputs.items():
        kinds = {_kind(name) for name, read in inputs.items() if _among(read, produced)}
        members = [name for name in maps if _kind(name) in kinds]
        readers = tuple(name for name in block.linears if name in members)
        routers = tuple(name for name in members if name not in block.linears)
        if readers:
            folds.append(Fold(norm, readers, routers, produced.shape[1]))
    return folds


def _behind_linears(block: Block) -> list[Fold]:
    folds = []
    for name, linear in block.linears.items():
        parent, dot, child = name.rpartition(".")
        source = parent + dot + SOURCES.get(child, "")
        if source in block.linears and block.linears[source].out_features == linear.in_features:
            folds.append(Fold(source, (name,), (), linear.in_features))
    return folds


def _keeps_function(block: Block, fold: Fold) -> bool:
    """Whether rescaling by powers of two leaves the block's outputs equal to the bit."""
    parts = [
        block.module.get_submodule(name) for name in (fold.source, *fold.readers, *fold.routers)
    ]
    saved = [{key: value.clone() for key, value in part.state_dict().items()} for part in parts]
    weight = parts[0].weight
    assert isinstance(weight, Tensor)
    channels = torch.arange(fold.width, device=weight.device)
    try:
        fold.apply(block.module, torch.exp2(channels * 7 % 5 - 2))
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
    """The name with experts' numbers left out: what one expert reads, all of them read."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _among(rows: Tensor, table: Tensor) -> bool:
    """Whether each row is one of the table's; both [tokens, features]."""
    if len(rows) == 0 or rows.shape[1] != table.shape[1]:
        return False
    return bool((rows[:, None] == table).all(2).any(1).all())

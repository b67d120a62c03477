"""The proof of bits: a quantized model computes with the bits that its configuration states.

Attributes prove little, since a layer can have a quantizer and not use it. During forward passes of
the whole model, a function mode intercepts the two tensors that enter every `F.linear` of every
layer that should be quantized. It counts their distinct values per scale: at most 2^w in the weight
and 2^a in the input. Which elements share a scale is taken from the layer's quantizers. A layer
without quantizers counts as having one scale.

A count alone proves nothing if a scale has no more elements than levels, as for a token of 128
features at 8 bits. So values with stored scales must also be reproduced by the quantizer's own
quantize and dequantize, with at most 2^b codes in all; otherwise they count as having one scale.
Values whose scales are made in the call (one per token) have no stored scale to compare with. For
such a small group, the evenly spaced levels between its ends are counted instead, with its smallest
gap as their distance.

With `first_token="float"` the inputs at first positions are left out of the count.

A layer that no forward pass reaches (an expert without a token, the vision tower without an image)
runs alone on random inputs and is marked `probed`. A layer that multiplies nothing even then has
zero levels and is refused.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qvlm.errors import UserError
from qvlm.quantization.experts import fused_experts
from qvlm.quantization.hooks import hooked
from qvlm.quantization.position_quantizer import PositionQuantizer
from qvlm.quantization.quantizer import Quantizer, UniformQuantizer
from qvlm.quantization.sampling import evenly_spaced
from qvlm.quantization.spec import QuantizationConfig
from qvlm.quantization.targets import ROUTER_NAMES, block_layers, quantizable

_PROBE_TOKENS = 64
# Number of rows of a tensor that are counted: enough to expose any float tensor, at a bounded cost.
_MAX_ROWS = 1024


@dataclass(frozen=True)
class LayerBits:
    """The levels that one layer was observed to multiply.

    Attributes:
        layer: Full name in the model.
        w_bits, a_bits: Bits of weight and input according to the configuration.
        weight_levels, input_levels: Largest number of distinct values of one scale; 0 if the layer
            was never observed.
        probed: Whether the layer was observed on random inputs only.
    """

    layer: str
    w_bits: int
    a_bits: int
    weight_levels: int
    input_levels: int
    probed: bool = False


def expected_layers(model: nn.Module, vision_tower: bool) -> list[str]:
    """Full names of the layers that must be quantized, read from the float model.

    Fused experts get the names that `unfuse_experts` will give them.

    Raises:
        UserError: If a block holds a matrix that is neither a linear's, nor a router's, nor that of
            fused experts. It would stay in floating point, and no proof would name it.
    """
    names = []
    for block_name, (_, block) in block_layers(model, vision_tower).items():
        _require_known_matrices(block_name, block)
        names += [f"{block_name}.{name}" for name in quantizable(block)]
        for name, fused in fused_experts(block).items():
            names += [
                f"{block_name}.{name}.{expert}.{part}"
                for expert in range(next(fused.parameters()).shape[0])
                for part in ("gate_proj", "up_proj", "down_proj")
            ]
    return names


def _require_known_matrices(name: str, block: nn.Module) -> None:
    """Refuses a block with a matrix that nothing quantizes."""
    known = {*quantizable(block), *fused_experts(block)}
    for parameter_name, parameter in block.named_parameters():
        owner = parameter_name.rpartition(".")[0]
        if parameter.ndim < 2 or owner in known or ROUTER_NAMES & set(owner.split(".")):
            continue
        kind = type(block.get_submodule(owner)).__name__
        raise UserError(
            f"{name}.{parameter_name} ({kind}) is a matrix that would stay in floating point: it "
            "is neither the weight of a linear, nor a router's, nor that of fused experts in a "
            "layout that is supported (gate_up_proj and down_proj)"
        )


@torch.no_grad()
def measure_bits(
    model: nn.Module,
    expected: Sequence[str],
    batches: Iterable[Mapping[str, Tensor]],
    quantization: QuantizationConfig,
) -> list[LayerBits]:
    """Counts the levels of every expected layer during forward passes on `batches`.

    One or two batches are enough, preferably with an image among them.

    Args:
        model: Quantized model.
        expected: Names of layers, from `expected_layers`.
        batches: Keyword arguments of the model's forward.
        quantization: Configuration to be proven.

    Returns:
        One row per expected layer, in that order.
    """
    modules = {name: model.get_submodule(name) for name in expected if _has(model, name)}
    kinds = {
        name: kind for name, (kind, _) in block_layers(model, quantization.vision_tower).items()
    }
    counter = _Counter(
        {name: quantization.activation(_kind(name, kinds)).bits for name in expected},
        quantization.weight.bits,
    )
    with counter.watch(modules):
        for batch in batches:
            model(**batch, use_cache=False)
    probed = [name for name in modules if name not in counter.levels]
    with counter.watch({name: modules[name] for name in probed}):
        for name in probed:
            features = getattr(modules[name], "in_features", None)
            if features is not None:
                modules[name](_probe(modules[name], features))
    return [
        LayerBits(
            name,
            quantization.weight.bits,
            counter.input_bits[name],
            *counter.levels.get(name, (0, 0)),
            probed=name in probed,
        )
        for name in expected
    ]


def check_bits(rows: Iterable[LayerBits]) -> list[str]:
    """Names of the layers with more levels than their bits allow, or that were never observed."""
    return [
        row.layer
        for row in rows
        if not (0 < row.weight_levels <= 2**row.w_bits and 0 < row.input_levels <= 2**row.a_bits)
    ]


class _Counter(TorchFunctionMode):
    """Counts levels in each `F.linear` within the watched modules; keeps each layer's largest."""

    def __init__(self, input_bits: dict[str, int], weight_bits: int) -> None:
        super().__init__()
        self.input_bits = input_bits
        self.weight_bits = weight_bits
        self.levels: dict[str, tuple[int, int]] = {}
        self._within: list[tuple[str, nn.Module]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and self._within:
            values = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            name, module = self._within[-1]
            first = getattr(module, "first_token", None)
            rows = first and first.rows(values["input"])
            if rows is not None:  # stated in the configuration: that position is not quantized
                values["input"] = values["input"][~rows]
            seen = (
                _levels(values["weight"], _quantizer(module, "weight"), self.weight_bits, False),
                _levels(values["input"], _quantizer(module, "input"), self.input_bits[name], True),
            )
            before = self.levels.get(name, (0, 0))
            self.levels[name] = max(before[0], seen[0]), max(before[1], seen[1])
        return func(*args, **kwargs)

    @contextmanager
    def watch(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Counts within `modules` while the context is open."""

        def enter(name: str) -> Any:
            return lambda module, args: self._within.append((name, module))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._within.pop()

        entering = {module: enter(name) for name, module in modules.items()}
        try:
            with hooked(entering, dict.fromkeys(modules.values(), leave)), self:
                yield
        finally:
            self._within.clear()


def _levels(values: Tensor, quantizer: Quantizer | None, bits: int, folded: bool) -> int:
    """Largest number of values [..., features] of one scale, as the module's docstring says."""
    values = values.detach().float()
    rows = values.flatten(0, -2)
    scales = torch.zeros((), dtype=torch.long, device=values.device)
    small = True
    if quantizer is not None:
        stored = quantizer.for_tokens(values) is quantizer
        if not stored or _reproduced(values, quantizer, bits, folded):
            scales, small = quantizer.group_index(values), not stored
    scales = scales.expand(values.shape).flatten(0, -2)
    kept = evenly_spaced(len(rows), _MAX_ROWS, rows.device)
    return _most_levels(rows[kept].flatten(), scales[kept].flatten(), 2**bits if small else 0)


def _reproduced(values: Tensor, quantizer: Quantizer, bits: int, folded: bool) -> bool:
    """Whether a quantizer with stored scales maps `values` to themselves through 2^bits codes."""
    if folded and isinstance(quantizer, UniformQuantizer) and quantizer.folds:
        values = values * quantizer.scale
    codes = quantizer.quantize(values)
    return len(codes.unique()) <= 2**bits and torch.equal(quantizer.dequantize(codes), values)


def _most_levels(values: Tensor, scales: Tensor, small: int) -> int:
    """Largest number of distinct values among those of one scale.

    Args:
        values: Values [n].
        scales: Index of the scale of each value, [n].
        small: Number of elements up to which the spacing of a scale's values is counted instead.
    """
    if not values.numel():
        return 0
    values, order = values.sort()
    scales, inner = scales[order].sort(stable=True)
    values = values[inner]
    _, group, sizes = scales.unique_consecutive(return_inverse=True, return_counts=True)
    gap = values.diff().double()
    apart = (gap > 0) & (group[1:] == group[:-1])
    levels = torch.ones_like(sizes).index_add_(0, group[1:], apart.long())
    smallest = torch.full_like(sizes, torch.inf, dtype=torch.float64)
    smallest.scatter_reduce_(0, group[1:][apart], gap[apart], "amin")
    ends = sizes.cumsum(0)
    width = values[ends - 1].double() - values[ends - sizes].double()
    spaced = 1 + (width / smallest).round().clamp_max(2**31).long()
    return int(torch.where(sizes <= small, spaced, levels).max())


def _quantizer(module: nn.Module, of: str) -> Quantizer | None:
    quantizer = getattr(module, f"{of}_quantizer", None)
    return quantizer if isinstance(quantizer, Quantizer) else None


def _kind(layer: str, kinds: Mapping[str, str]) -> str:
    return next((kind for name, kind in kinds.items() if layer.startswith(f"{name}.")), "language")


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _probe(module: nn.Module, features: int) -> Tensor:
    """Random tokens [tokens, features] in the dtype and on the device of a layer's weight."""
    tensor = next(iter([*module.parameters(), *module.buffers()]))
    inputs = _quantizer(module, "input")
    count = len(inputs.scale) if isinstance(inputs, PositionQuantizer) else _PROBE_TOKENS
    tokens = torch.randn(count, features, generator=torch.Generator().manual_seed(0))
    return tokens.to(tensor)

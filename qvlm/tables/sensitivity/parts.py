"""The parts of a model that are quantized alone or left in floating point, and in which states.

The parts of a decoder are named after what their linears read, as on the page of outliers. Experts
are a part of their own, and their linears also belong to the parts that are named after inputs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from qvlm.quantization.targets import block_layers
from qvlm.tables.outliers import INPUTS

REFERENCE, WHOLE, PART, DEPTH = "reference", "whole", "part", "depth"  # levels of parts
ALONE, OTHERS = "alone", "all others"  # what is quantized: the part, or everything but it
BOTH, WEIGHTS, ACTIVATIONS = "both", "weights", "activations"  # which operands of a linear are
NOTHING, EVERYTHING = "nothing", "everything"  # names of the parts of level `WHOLE`
STRETCHES = 8  # into at most so many parts the layers of tower and decoder are divided by depth
TITLES = {"vision": "tower", "language": "decoder"}


@dataclass(frozen=True)
class Part:
    """Some of a model's linears.

    Attributes:
        name: Name in tables.
        level: `WHOLE`, `PART` or `DEPTH`; `REFERENCE` for full precision.
        layers: Full names of the linears.
    """

    name: str
    level: str
    layers: frozenset[str]


@dataclass(frozen=True)
class State:
    """A model of which some linears are quantized.

    Attributes:
        part: Part that the state is about.
        quantized: `ALONE` or `OTHERS`.
        operands: Which operands of the part's linears are quantized: `BOTH`, or one of the two.
        layers: Full names of the linears that are quantized.
    """

    part: Part
    quantized: str
    operands: str
    layers: frozenset[str]

    @property
    def name(self) -> str:
        """Name of the state that is part of a file's name."""
        return f"{self.part.name}-{self.quantized}-{self.operands}".replace(" ", "_")


def states_of(model: nn.Module, layers: Sequence[str], vision_tower: bool) -> list[State]:
    """Returns the states to measure.

    Args:
        model: Quantized model.
        layers: Full names of the quantized linears, from `expected_layers`.
        vision_tower: Whether the vision tower is among them.
    """
    blocks = block_layers(model, vision_tower)
    within = {name: [x for x in layers if x.startswith(f"{name}.")] for name in blocks}
    kinds = {name: kind for name, (kind, _) in blocks.items()}
    every = frozenset(layers)
    whole = Part(EVERYTHING, WHOLE, every)
    states = [State(Part(NOTHING, WHOLE, frozenset()), ALONE, BOTH, frozenset()), *_alone(whole)]
    for part in [*_parts(within, kinds), *_stretches(within, kinds)]:
        states += _alone(part)
        states.append(State(part, OTHERS, BOTH, every - part.layers))
    return states


def _alone(part: Part) -> list[State]:
    """The states in which nothing but a part is quantized."""
    operands = (BOTH,) if part.level == DEPTH else (BOTH, WEIGHTS, ACTIVATIONS)
    return [State(part, ALONE, some, part.layers) for some in operands]


def _parts(within: Mapping[str, Sequence[str]], kinds: Mapping[str, str]) -> Iterator[Part]:
    """Vision tower, projector, and the decoder's linears by what they read."""
    found: dict[str, list[str]] = {"vision tower": [], "projector": []}
    experts: list[str] = []
    for block, layers in within.items():
        for layer in layers:
            child = layer.rpartition(".")[2]
            reads = {"vision": "vision tower", "projector": "projector"}.get(kinds[block])
            found.setdefault(reads or INPUTS.get(child, child), []).append(layer)
            if reads is None and "experts" in layer.split("."):
                experts.append(layer)
    found["experts"] = experts
    yield from (Part(name, PART, frozenset(own)) for name, own in found.items() if own)


def _stretches(within: Mapping[str, Sequence[str]], kinds: Mapping[str, str]) -> Iterator[Part]:
    """Consecutive layers of the tower, then of the decoder."""
    for kind, title in TITLES.items():
        blocks = [layers for name, layers in within.items() if kinds[name] == kind]
        count = min(STRETCHES, len(blocks))
        ends = [round(index * len(blocks) / count) for index in range(1, count + 1)]
        for start, end in zip([0, *ends], ends, strict=False):
            name = f"{title} {start}" if end == start + 1 else f"{title} {start}-{end - 1}"
            layers = frozenset(layer for block in blocks[start:end] for layer in block)
            yield Part(name, DEPTH, layers)

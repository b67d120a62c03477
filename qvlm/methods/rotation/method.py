"""QuaRot (arXiv 2404.00456): a rotated language model, rounded with or without compensation.

Three rotations, each of which can be left out:

- the residual stream (`stream.py`), absorbed by the weights around it,
- the values of each head (`layer.py`), absorbed by value and output projections,
- the input of the down projections, which no weight can absorb because a product of two functions
  stands before it. It is transformed when the model runs (`online`).

Not here: rotated queries and keys, which serve a quantized cache; the cache is not quantized here.
QuaRot also rotates the input of the attention output across heads when the model runs:
`online=[o_proj,down_proj]` transforms its whole width.

The vision tower is left as it is by default. Its embeddings pass a norm before the first layer,
whose gain no linear absorbs, so that its residual stream cannot be rotated for free. With
`vision=true`, each of its linears transforms its own input when the model runs.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qvlm import validation
from qvlm.errors import UserError
from qvlm.methods.activations import activations, titled
from qvlm.methods.base import MethodReport
from qvlm.methods.gptq.method import Compensated, Rounding
from qvlm.methods.rotation.layer import rotate_layer
from qvlm.methods.rotation.stream import StreamRotation, rotate_ends
from qvlm.quantization.block import Block
from qvlm.quantization.calibration import Walk
from qvlm.quantization.precision import settled

ROUNDINGS = ("gptq", "nearest")
ONLINE = ("o_proj", "down_proj")
# Other names of the same projections.
_NAMES = {"dense": "o_proj", "fc2": "down_proj"}


class Rotations:
    """Which parts of a model are rotated.

    Args:
        stream: Whether the residual stream of the language model is.
        heads: Whether the values of each head are.
        online: Projections of the language model whose input is transformed when the model runs.
        vision: Whether every linear of the vision tower transforms its input.
        seed: Seed of the random signs.

    Raises:
        UserError: If an option has a value that is not accepted; the message names both.
    """

    def __init__(
        self, stream: bool, heads: bool, online: Sequence[str], vision: bool, seed: int
    ) -> None:
        for name, switch in (("stream", stream), ("heads", heads), ("vision", vision)):
            validation.switch(f"method.{name}", switch)
        for name in online:
            validation.one_of("method.online", name, ONLINE)
        validation.seed("method.seed", seed)
        self.stream, self.heads, self.vision, self.seed = stream, heads, vision, seed
        self.online = frozenset(online)

    def begin(self, walk: Walk) -> StreamRotation | None:
        """Rotates what lies around the decoder layers, before the walk begins."""
        if not self.stream:
            return None
        rotation = rotate_ends(walk.model, self.seed)
        _settle(walk.model)
        return rotation

    def rotate(self, block: Block, rotation: StreamRotation | None) -> None:
        """Rotates a block's float linears, if the block is a decoder layer.

        Args:
            block: Block of a walk, which is changed in place.
            rotation: What `begin` returned.
        """
        if block.kind == "language" and (rotation is not None or self.heads):
            rotate_layer(block.module, rotation, self.heads, block.inputs, block.name)
            _settle(block.module)

    def transforming(self, block: Block) -> frozenset[str]:
        """Names of the linears of a block that transform their input when the model runs.

        Raises:
            UserError: If a decoder layer has no linear of a name in `online`.
        """
        if block.kind == "vision":
            return frozenset(block.linears if self.vision else ())
        if block.kind != "language":
            return frozenset()
        last = {name: name.rpartition(".")[2] for name in block.linears}
        known = {name: _NAMES.get(end, end) for name, end in last.items()}
        if missing := sorted(self.online - set(known.values())):
            raise UserError(
                f"method.online={missing[0]} is no linear of {block.name}, which has "
                f"{', '.join(sorted(set(last.values())))}. Leave it out."
            )
        return frozenset(name for name, title in known.items() if title in self.online)


@torch.no_grad()
def _settle(module: nn.Module) -> None:
    """Rounds parameters in float64 to float32, in which they are saved (see `precision`)."""
    for parameter in module.parameters():
        if parameter.dtype == torch.float64 and not parameter.is_meta:
            parameter.copy_(settled(parameter))


class QuaRot:
    """A rotated language model, with rounded weights.

    Args:
        rounding: "gptq" (with compensation) or "nearest".
        stream, heads, online, vision, seed: See `Rotations`.
        damping, activation_order, sequential, max_tokens, min_tokens: See `gptq.method.Rounding`.
        per_token: Whether the language model's activations have a scale per token, which is made
            when the token arrives, instead of the granularity of the cell's quantizer.

    Raises:
        UserError: If an option has a value that is not accepted; the message names both.
    """

    def __init__(
        self,
        rounding: str = "gptq",
        stream: bool = True,
        heads: bool = True,
        online: Sequence[str] = ("down_proj",),
        vision: bool = False,
        seed: int = 0,
        damping: float = 0.01,
        activation_order: bool = True,
        sequential: bool = True,
        max_tokens: int = 4096,
        min_tokens: int = 32,
        per_token: bool = False,
    ) -> None:
        validation.switch("method.per_token", per_token)
        self.per_token = per_token
        validation.one_of("method.rounding", rounding, ROUNDINGS)
        self.rotations = Rotations(stream, heads, online, vision, seed)
        compensating = Rounding(damping, activation_order, sequential, max_tokens, min_tokens)
        self.rounding = compensating if rounding == "gptq" else None
        self.name = titled("QuaRot" if rounding == "gptq" else "QuaRot (RTN)", per_token)

    def quantize(self, walk: Walk) -> MethodReport:
        """Rotates the language model, then replaces every linear, block after block."""
        begun = time.process_time()
        with activations(walk, self.per_token):
            details = rotate_and_round(walk, self.rotations, self.rounding)
        return MethodReport(time.process_time() - begun, details=details)


def rotate_and_round(
    walk: Walk,
    rotations: Rotations,
    rounding: Rounding | None,
    weights: Sequence[Tensor] | None = None,
) -> dict[str, Any]:
    """Rotates a model and replaces its linears, block after block.

    Args:
        walk: Walk over the model.
        rotations: What is rotated.
        rounding: How weights are rounded with compensation; None rounds to nearest.
        weights: Weight of each token of each calibration batch, [tokens], which counts in the
            decoder layers; None weighs all alike.

    Returns:
        The details of a report.
    """
    done = None if rounding is None else Compensated(rounding)
    rotation = rotations.begin(walk)
    for block in walk.blocks():
        rotations.rotate(block, rotation)
        transforms = rotations.transforming(block)
        if done is not None:
            done.quantize(block, transforms, weights if block.kind == "language" else None)
            continue
        for name, samples in block.linear_inputs().items():
            layer = block.quantize_linear(name, samples, hadamard=name in transforms)
            block.replace(name, layer)
    found = {} if done is None else {"layers": done.layers, "rounded_to_nearest": done.nearest}
    return {**found, "uncalibrated": list(walk.uncalibrated)}

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

from torch import Tensor

from qvlm import validation
from qvlm.methods.base import MethodReport
from qvlm.methods.gptq.method import Rounding
from qvlm.methods.rotation.layer import rotate_layer
from qvlm.methods.rotation.stream import StreamRotation, rotate_ends
from qvlm.quantization.block import Block
from qvlm.quantization.calibration import Walk

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
        self._rotation: StreamRotation | None = None

    def begin(self, walk: Walk) -> None:
        """Rotates what lies around the decoder layers, before the walk begins."""
        if self.stream:
            self._rotation = rotate_ends(walk.model, self.seed)

    def rotate(self, block: Block) -> None:
        """Rotates a block's float linears, if the block is a decoder layer."""
        if block.kind == "language" and (self._rotation is not None or self.heads):
            rotate_layer(block.module, self._rotation, self.heads, block.inputs, block.name)

    def transforms(self, block: Block, name: str) -> bool:
        """Whether a linear of a block transforms its input when the model runs."""
        if block.kind == "vision":
            return self.vision
        last = name.rpartition(".")[2]
        return block.kind == "language" and _NAMES.get(last, last) in self.online


class QuaRot:
    """A rotated language model, with rounded weights.

    Args:
        rounding: "gptq" (with compensation) or "nearest".
        stream, heads, online, vision, seed: See `Rotations`.
        damping, activation_order, sequential, max_tokens, min_tokens: See `gptq.method.Rounding`.

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
    ) -> None:
        validation.one_of("method.rounding", rounding, ROUNDINGS)
        self.compensates = rounding == "gptq"
        self.rotations = stream, heads, online, vision, seed
        self.rounding = damping, activation_order, sequential, max_tokens, min_tokens
        Rotations(*self.rotations), Rounding(*self.rounding)
        self.name = "QuaRot" if self.compensates else "QuaRot (RTN)"

    def quantize(self, walk: Walk) -> MethodReport:
        """Rotates the language model, then replaces every linear, block after block."""
        begun = time.perf_counter()
        return self.quantize_weighted(walk, None, begun)

    def quantize_weighted(
        self, walk: Walk, weights: Sequence[Tensor] | None, begun: float
    ) -> MethodReport:
        """Quantizes as `quantize` does, with a weight for each token of each calibration batch.

        Args:
            walk: Walk over the model.
            weights: Weight of each token of each batch, [tokens]; None weighs all alike.
            begun: Time at which the method began, by `time.perf_counter`.
        """
        rotations, rounding = Rotations(*self.rotations), Rounding(*self.rounding)
        rotations.begin(walk)
        for block in walk.blocks():
            rotations.rotate(block)

            def transforms(name: str, block: Block = block) -> bool:
                return rotations.transforms(block, name)

            if self.compensates:
                rounding.quantize(block, transforms, weights if block.kind == "language" else None)
                continue
            for name, samples in block.linear_inputs().items():
                layer = block.quantize_linear(name, samples, hadamard=transforms(name))
                block.replace(name, layer)
        return MethodReport(time.perf_counter() - begun, details=rounding.details(walk))

"""RoCo, rotation and confident compensation: 4-bit weights and activations for LLaVAs.

1. **Rotate** (`qvlm.methods.rotation`). The norms of the language model are folded into what reads
   them, and its residual stream and the values of each head are rotated by random Hadamard
   matrices, at no cost. The input of the down projections is transformed when the model runs.
   Outlier channels, which decide the step of a quantizer, are spread over all channels.
2. **Compensate** (`qvlm.methods.gptq`). Weights are rounded column by column against the gram
   matrix of inputs that are quantized already, each linear after those before it in its block.
3. **Weigh** (`confidence.py`). A token of the calibration set counts as much as the float model is
   sure of what follows it. The tokens of an expert keep their weights on the way through the
   router, and an expert with hardly any token is rounded to nearest and named in the record.

Everything is static but the scales that the cell's quantizer makes per token, if it does. There is
no search and no training. Without the weights (`floor=null`) a model can be streamed; with them the
whole float model has to run once.

The parts are known (docs/method.md has the relatives, and what each part is measured to bring). The
weights of tokens, compensation along the clusters of the activations, and the rotation that keeps a
mean are ours.
"""

import time
from collections.abc import Sequence

from qvlm import validation
from qvlm.methods.activations import activations, titled
from qvlm.methods.base import MethodReport
from qvlm.methods.gptq.method import Rounding
from qvlm.methods.roco.confidence import confidence
from qvlm.methods.rotation.method import Rotations, rotate_and_round
from qvlm.quantization.calibration import Walk


class RoCo:
    """A rotated language model, rounded with compensation for the tokens that matter.

    Args:
        floor: Weight of a token of which the model is not sure at all, beside 1 for one of which it
            is certain. None weighs all tokens alike.
        stream, heads, online, vision, seed: See `rotation.method.Rotations`.
        damping, activation_order, sequential, max_tokens, min_tokens: See `gptq.method.Rounding`.
        per_token: Whether the language model's activations have a scale per token, which is made
            when the token arrives, instead of the granularity of the cell's quantizer.

    Attributes:
        one_pass: Whether the method takes one block after the other and never the whole model.

    Raises:
        UserError: If an option has a value that is not accepted; the message names both.
    """

    def __init__(
        self,
        floor: float | None = 0.1,
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
        if floor is not None:
            validation.positive("method.floor", floor)
        self.floor = floor
        self.name = titled("RoCo", per_token)
        self.rotations = Rotations(stream, heads, online, vision, seed)
        self.rounding = Rounding(damping, activation_order, sequential, max_tokens, min_tokens)
        self.one_pass = floor is None

    def quantize(self, walk: Walk) -> MethodReport:
        """Rotates the language model, then replaces every linear, block after block."""
        begun = time.process_time()
        weights = None
        if self.floor is not None:
            weights = confidence(walk.model, walk.batches, self.floor)
        with activations(walk, self.per_token):
            details = rotate_and_round(walk, self.rotations, self.rounding, weights)
        return MethodReport(time.process_time() - begun, details=details)

"""GPTQ as a method, and the rounding of one block that rotated methods share.

The blocks come in the order of the data. Within a block, linears that read the same thing are
rounded together, and what the next ones read is computed with these in place: first queries, keys
and values, then the attention output, gate and up, down. The released code of GPTQ calls that true
sequential.

GPTQ was published for weights alone. Here weights are compensated for what quantized inputs make of
them, and inputs are quantized as in every other method.
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qvlm import validation
from qvlm.methods.activations import activations, titled
from qvlm.methods.base import MethodReport
from qvlm.methods.gptq.rounding import compensated_rounding, objective
from qvlm.methods.gptq.samples import Samples, collect
from qvlm.quantization.block import Block
from qvlm.quantization.calibration import Walk
from qvlm.quantization.hadamard import hadamard_transform
from qvlm.quantization.linear import QuantLinear, folded_weight
from qvlm.quantization.ranges import weight_quantizer

_COMPARED_TOKENS = 64
# Linears that read the same thing, in the order of the data, by the names that transformers uses.
STAGES = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj", "out_proj", "dense"),
    ("gate_proj", "up_proj", "fc1", "linear_1"),
    ("down_proj", "fc2", "linear_2"),
)


@dataclass(frozen=True)
class Rounding:
    """How linears are rounded with compensation.

    Args:
        damping: See `compensated_rounding`.
        activation_order: See `compensated_rounding`.
        sequential: Whether the linears of a block are rounded in the order of the data.
        max_tokens: Approximate number of calibration tokens per linear.
        min_tokens: Number of tokens below which a linear (an expert) is rounded to nearest.

    Raises:
        UserError: If an option has a value that is not accepted; the message names both.
    """

    damping: float = 0.01
    activation_order: bool = True
    sequential: bool = True
    max_tokens: int = 4096
    min_tokens: int = 32

    def __post_init__(self) -> None:
        validation.positive("method.damping", self.damping)
        validation.switch("method.activation_order", self.activation_order)
        validation.switch("method.sequential", self.sequential)
        validation.whole_number("method.max_tokens", self.max_tokens)
        validation.whole_number("method.min_tokens", self.min_tokens)


class Compensated:
    """Rounds the linears of one block after the other, and notes what it did.

    Args:
        rounding: How linears are rounded.

    Attributes:
        layers: For each linear so far its name, the number of its tokens, and its error as a share
            of that of rounding to nearest.
        nearest: Full names of the linears that had too few tokens and were rounded to nearest.
    """

    def __init__(self, rounding: Rounding) -> None:
        self.rounding = rounding
        self.layers: list[dict[str, Any]] = []
        self.nearest: list[str] = []

    def quantize(
        self,
        block: Block,
        hadamard: Collection[str] = (),
        weights: Sequence[Tensor] | None = None,
    ) -> None:
        """Replaces the linears of a block.

        Args:
            block: Block of a walk.
            hadamard: Names of the linears that transform their input.
            weights: Weight of each token of each call of the block; None weighs all alike.
        """
        for stage in stages(block) if self.rounding.sequential else [list(block.linears)]:
            found = collect(block, stage, self.rounding.max_tokens, weights)
            for name, samples in found.items():
                block.replace(name, self._linear(block, name, samples, name in hadamard))

    def _linear(self, block: Block, name: str, samples: Samples, hadamard: bool) -> QuantLinear:
        linear, layer = block.linears[name], block.layer_name(name)
        if len(samples.tokens) < self.rounding.min_tokens:
            self.nearest.append(layer)
            return block.quantize_linear(name, samples.tokens, hadamard=hadamard)
        if hadamard:
            samples = Samples(hadamard_transform(samples.tokens), samples.weights)
        inputs = block.input_quantizer(name, samples.tokens)
        weight = folded_weight(linear.weight, inputs, hadamard)
        quantizer = weight_quantizer(weight, block.spec(name)[0], inputs=inputs)
        gram = samples.gram(inputs)
        options = self.rounding.damping, self.rounding.activation_order
        rounded = compensated_rounding(weight, gram, quantizer, *options)
        error, nearest = (
            float(objective(weight, candidate, gram).sum())
            for candidate in (rounded, quantizer(weight))
        )
        share = error / nearest if nearest > 0 else 1.0
        self.layers.append({"layer": layer, "tokens": len(samples.tokens), "error": share})
        return QuantLinear(rounded, linear.bias, quantizer, inputs, layer, hadamard)


def stages(block: Block) -> list[list[str]]:
    """Groups the linears of a block by when the data reaches them.

    Linears of the usual names go by `STAGES`, all experts together. In a block with another name
    (`qkv`, `proj`), neighbors in the order of execution that read the same are one stage.
    """
    names = list(block.linears)
    known = [[name for name in names if name.rpartition(".")[2] in stage] for stage in STAGES]
    if sum(map(len, known)) == len(names):
        return [stage for stage in known if stage]
    read = block.linear_inputs(_COMPARED_TOKENS)
    found = [names[:1]]
    for before, name in pairwise(names):
        if torch.equal(read[before], read[name]):
            found[-1].append(name)
        else:
            found.append([name])
    return found


class GPTQ:
    """Weights rounded with compensation, on the shared activation quantizer.

    Args:
        damping, activation_order, sequential, max_tokens, min_tokens: See `Rounding`.
        per_token: Whether the language model's activations have a scale per token, which is made
            when the token arrives, instead of the granularity of the cell's quantizer.

    Raises:
        UserError: If an option has a value that is not accepted; the message names both.
    """

    def __init__(
        self,
        damping: float = 0.01,
        activation_order: bool = True,
        sequential: bool = True,
        max_tokens: int = 4096,
        min_tokens: int = 32,
        per_token: bool = False,
    ) -> None:
        validation.switch("method.per_token", per_token)
        self.per_token = per_token
        self.name = titled("GPTQ", per_token)
        self.rounding = Rounding(damping, activation_order, sequential, max_tokens, min_tokens)

    def quantize(self, walk: Walk) -> MethodReport:
        """Replaces every linear, block after block; there is no search.

        Returns:
            A report whose details state what `Compensated` noted, and the layers that saw no token.
        """
        begun = time.process_time()
        done = Compensated(self.rounding)
        with activations(walk, self.per_token):
            for block in walk.blocks():
                done.quantize(block)
        details = {
            "layers": done.layers,
            "rounded_to_nearest": done.nearest,
            "uncalibrated": list(walk.uncalibrated),
        }
        return MethodReport(time.process_time() - begun, details=details)

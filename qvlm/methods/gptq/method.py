"""GPTQ as a method, and the rounding of one block that rotated methods share.

The blocks come in the order of the data. Within a block, linears that read the same thing are
rounded together, and what the next ones read is computed with these in place: first queries, keys
and values, then the attention output, gate and up, down. The released code of GPTQ calls that true
sequential.

GPTQ was published for weights alone. Here weights are compensated for what quantized inputs make of
them, and inputs are quantized as in every other method.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qvlm import validation
from qvlm.methods.base import MethodReport
from qvlm.methods.gptq.rounding import compensated_rounding, objective
from qvlm.methods.gptq.samples import Samples, collect
from qvlm.quantization.block import Block
from qvlm.quantization.calibration import Walk
from qvlm.quantization.hadamard import hadamard_transform
from qvlm.quantization.linear import QuantLinear, folded_weight
from qvlm.quantization.ranges import weight_quantizer

# Linears that read the same thing, in the order of the data, by the names that transformers uses.
STAGES = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj", "out_proj", "dense"),
    ("gate_proj", "up_proj", "fc1", "linear_1"),
    ("down_proj", "fc2", "linear_2"),
)


def never(name: str) -> bool:
    """Says of no linear that it transforms its input."""
    return False


@dataclass
class Rounding:
    """Rounds the linears of a block with compensation.

    Args:
        damping: See `compensated_rounding`.
        activation_order: See `compensated_rounding`.
        sequential: Whether the linears of a block are rounded in the order of the data.
        max_tokens: Approximate number of calibration tokens per linear.
        min_tokens: Number of tokens below which a linear (an expert) is rounded to nearest.

    Attributes:
        entries: What the report says about each linear so far.
        nearest: Full names of the linears with too few tokens so far.

    Raises:
        UserError: If an option has a value that is not accepted; the message names both.
    """

    damping: float = 0.01
    activation_order: bool = True
    sequential: bool = True
    max_tokens: int = 4096
    min_tokens: int = 32
    entries: list[dict[str, Any]] = field(default_factory=list)
    nearest: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        validation.positive("method.damping", self.damping)
        validation.switch("method.activation_order", self.activation_order)
        validation.switch("method.sequential", self.sequential)
        validation.whole_number("method.max_tokens", self.max_tokens)
        validation.whole_number("method.min_tokens", self.min_tokens)

    def quantize(
        self,
        block: Block,
        hadamard: Callable[[str], bool] = never,
        weights: Sequence[Tensor] | None = None,
    ) -> None:
        """Replaces the linears of a block.

        Args:
            block: Block of a walk.
            hadamard: Whether a linear, given its name in the block, transforms its input.
            weights: Weight of each token of each call of the block; None weighs all alike.
        """
        for names in stages(list(block.linears)) if self.sequential else [list(block.linears)]:
            for name, samples in collect(block, names, self.max_tokens, weights).items():
                block.replace(name, self._linear(block, name, samples, hadamard(name)))

    def _linear(self, block: Block, name: str, samples: Samples, hadamard: bool) -> QuantLinear:
        linear, layer = block.linears[name], block.layer_name(name)
        if len(samples.tokens) < self.min_tokens:
            self.nearest.append(layer)
            return block.quantize_linear(name, samples.tokens, hadamard=hadamard)
        if hadamard:
            samples = Samples(hadamard_transform(samples.tokens), samples.weights)
        inputs = block.input_quantizer(name, samples.tokens)
        weight = folded_weight(linear.weight, inputs, hadamard)
        quantizer = weight_quantizer(weight, block.spec(name)[0], inputs=inputs)
        gram = samples.gram(inputs)
        rounded = compensated_rounding(
            weight, gram, quantizer, self.damping, self.activation_order
        )
        nearest = float(objective(weight, quantizer(weight), gram).sum())
        error = float(objective(weight, rounded, gram).sum())
        share = error / nearest if nearest > 0 else 1.0
        self.entries.append({"layer": layer, "tokens": len(samples.tokens), "error": share})
        return QuantLinear(rounded, linear.bias, quantizer, inputs, layer, hadamard)

    def details(self, walk: Walk) -> dict[str, Any]:
        """The details of a report.

        Returns:
            For each linear the number of its tokens and its error as a share of that of rounding to
            nearest; the linears with too few tokens; the linears without any.
        """
        return {
            "layers": self.entries,
            "rounded_to_nearest": self.nearest,
            "uncalibrated": list(walk.uncalibrated),
        }


def stages(names: Sequence[str]) -> list[list[str]]:
    """Groups the linears of a block by when the data reaches them; unknown names come last."""
    known = [[name for name in names if name.rpartition(".")[2] in stage] for stage in STAGES]
    rest = [name for name in names if not any(name in stage for stage in known)]
    return [stage for stage in (*known, rest) if stage]


class GPTQ:
    """Weights rounded with compensation, on the shared activation quantizer.

    Args:
        damping, activation_order, sequential, max_tokens, min_tokens: See `Rounding`.

    Raises:
        UserError: If an option has a value that is not accepted; the message names both.
    """

    name = "GPTQ"

    def __init__(
        self,
        damping: float = 0.01,
        activation_order: bool = True,
        sequential: bool = True,
        max_tokens: int = 4096,
        min_tokens: int = 32,
    ) -> None:
        self.options = damping, activation_order, sequential, max_tokens, min_tokens
        Rounding(*self.options)

    def quantize(self, walk: Walk) -> MethodReport:
        """Replaces every linear, block after block; there is no search."""
        begun = time.perf_counter()
        rounding = Rounding(*self.options)
        for block in walk.blocks():
            rounding.quantize(block)
        return MethodReport(time.perf_counter() - begun, details=rounding.details(walk))

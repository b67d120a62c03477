"""AWQ, activation-aware weight quantization (arXiv 2306.00978).

A few weight channels matter most: those that multiply large activations. AWQ protects them by
scaling them before rounding (section 3.2; eq. 4 and 5, in `search.py`). Then it clips the range of
every weight group to the ratio that loses least of the group's share of the output (`clipping.py`).
Queries and keys are not clipped, as in the released code (llm-awq), since their errors meet in a
product.

`scaling` states where the scale s goes. "folded" is AWQ as published: s goes into the op before,
which then produces x / s, so that the activation quantizer sees smaller outliers. With
"weight_only", s exists only while the weight is rounded, and activations are quantized as without
AWQ.

By default the searches run with float activations, as published for weight-only quantization: that
is the AWQ that others compare with. `search_activations` quantizes activations in the searches too.

The search differs from llm-awq in these points:

- alpha is i / 19 for i = 0 .. 19 instead of i / 20.
- Rounding in the search of alpha uses the estimator that all methods start from, instead of min-max
  ranges.
- Clipping multiplies both ends of the min-max range by a ratio, instead of clamping symmetrically
  to a share of max|w|. The range that all methods start from is a candidate too.
- Clipping uses up to 4,096 tokens instead of 512.
- Vision tower and projector are quantized as well, instead of the decoder layers only.
- A block whose output error, with weights and activations quantized, is above that of plain
  rounding gets plain rounding (`fallback`). So AWQ's block error is never above RTN's.

Channels that cannot be rescaled, such as those behind an activation function, get no scale. A block
that no calibration data reaches gets plain rounding, and its entry in the report has no errors.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qvlm import validation
from qvlm.methods.awq.clipping import clipped_quantizer
from qvlm.methods.awq.rescaling import find_rescalings
from qvlm.methods.awq.search import ChosenScale, ScaleSearch, input_scale
from qvlm.methods.base import MethodReport
from qvlm.methods.objective import mean_squared_error
from qvlm.quantization.block import Block
from qvlm.quantization.calibration import Walk
from qvlm.quantization.linear import QuantLinear
from qvlm.quantization.quantizer import SMALLEST_SCALE, UniformQuantizer

SCALINGS = ("folded", "weight_only")
# Their outputs meet in a product before they reach the residual stream, so they are not clipped.
UNCLIPPED = ("q_proj", "k_proj")
# Tokens that llm-awq clips with.
_REFERENCE_TOKENS = 512


class AWQ:
    """Scaled and clipped weights.

    Args:
        scaling: "folded" or "weight_only".
        n_grid: Number of values of alpha from 0 to 1. With 1, only 0 is tried, which is no scaling.
        max_shrink: Largest share of a range that is clipped, from 0 (no clipping) to below 1.
        clip_grid: Number of steps from the whole range to none. Those up to `max_shrink` are tried.
        search_activations: Whether activations are quantized during the searches.
        fallback: Whether a block gets plain rounding where that has a smaller output error.
        reference: Whether to search as llm-awq does, in all of the points above but the last two:
            `n_grid` alphas from 0 to below 1, min-max ranges, symmetric clipping on 512 tokens. The
            vision tower and the projector are then rounded to nearest, and nothing falls back.

    Attributes:
        name: "AWQ", with the options of the search that differ from the published ones.

    Raises:
        UserError: If an option has a value that is not accepted.
    """

    def __init__(
        self,
        scaling: str = "folded",
        n_grid: int = 20,
        max_shrink: float = 0.5,
        clip_grid: int = 20,
        search_activations: bool = False,
        fallback: bool = True,
        reference: bool = False,
    ) -> None:
        validation.one_of("method.scaling", scaling, SCALINGS)
        validation.whole_number("method.n_grid", n_grid)
        validation.whole_number("method.clip_grid", clip_grid)
        if not validation.is_number(max_shrink) or not 0 <= max_shrink < 1:
            raise validation.refused(
                "method.max_shrink", max_shrink, "a number of at least 0 and below 1"
            )
        validation.switch("method.search_activations", search_activations)
        validation.switch("method.fallback", fallback)
        validation.switch("method.reference", reference)
        self.folded = scaling == "folded"
        alphas = [step / (n_grid if reference else max(1, n_grid - 1)) for step in range(n_grid)]
        self.search = ScaleSearch(alphas, self.folded, search_activations, reference)
        self.clip_ratios = [1 - step / clip_grid for step in range(int(max_shrink * clip_grid))]
        self.fallback = fallback and not reference
        self.reference = reference
        notes = ["reference search"] if reference else []
        notes += [] if self.folded else ["weight-only scaling"]
        notes += ["quantized search"] if search_activations else []
        self.name = f"AWQ ({', '.join(notes)})" if notes else "AWQ"

    def quantize(self, walk: Walk) -> MethodReport:
        """Scales, clips and replaces every linear, block after block.

        Returns:
            A report. For each block its details state what was chosen behind each op, which linears
            are not scaled, the mean squared error of the block's output with weights and
            activations quantized, that of RTN on the same inputs, and which of both was kept.
        """
        seconds, candidates = 0.0, 0
        blocks: list[dict[str, Any]] = []
        for block in walk.blocks():
            start = time.process_time()
            tried, details = self.quantize_block(block)
            seconds += time.process_time() - start
            candidates += tried
            blocks.append(details)
        details = {"blocks": blocks, "uncalibrated": list(walk.uncalibrated)}
        return MethodReport(seconds, candidates, details)

    def quantize_block(self, block: Block) -> tuple[int, dict[str, Any]]:
        """Replaces the linears of a block.

        Returns:
            The number of candidates that were evaluated, and the block's entry in the report.
        """
        samples = block.linear_inputs()
        plain = {name: block.quantize_linear(name, x) for name, x in samples.items()}
        if not block.inputs or (self.reference and block.kind != "language"):
            for name, layer in plain.items():
                block.replace(name, layer)
            return 0, _entry(block, [], list(plain), None, None, "RTN")
        plain_error = _output_error(block, plain)
        for name in plain:
            block.restore(name)

        before = {key: value.clone() for key, value in block.module.state_dict().items()}
        choices = [
            self.search.choose(block, rescaling, samples)
            for rescaling in find_rescalings(block)
            if any(len(samples[name]) for name in rescaling.readers)
        ]
        scales = {name: choice.scale for choice in choices for name in choice.rescaling.readers}
        if self.folded:
            for choice in choices:
                choice.rescaling.apply(block.module, choice.scale)
        layers = {
            name: self.quantize_linear(block, name, x, scales.get(name))
            for name, x in samples.items()
        }
        error = _output_error(block, layers)
        kept = "AWQ"
        if self.fallback and not error <= plain_error:
            for name in plain:
                block.restore(name)
            block.module.load_state_dict(before)
            for name, layer in plain.items():
                block.replace(name, layer)
            kept = "RTN"
        tried = len(self.search.alphas) * len(choices) + len(self.clip_ratios) * len(layers)
        unscaled = [name for name in layers if name not in scales]
        return tried, _entry(block, choices, unscaled, error, plain_error, kept)

    def quantize_linear(
        self, block: Block, name: str, samples: Tensor, scale: Tensor | None
    ) -> QuantLinear:
        """Quantizes a linear with clipped weight ranges; if scales are folded, they already are.

        Args:
            block: Block of the linear.
            name: Name of the linear in the block.
            samples: What the linear read before any folding, [tokens, in].
            scale: Scale of its input channels, [in]; None if they have none.
        """
        spec = block.spec(name)[0]
        one = torch.ones(samples.shape[1], device=samples.device)
        scale = one if scale is None else scale
        outside, within = (scale, one) if self.folded else (one, scale)
        samples = samples / outside
        inputs = block.input_quantizer(name, samples)
        seen = inputs(samples) if self.search.quantize_inputs else samples
        seen = seen / (input_scale(inputs) * within)
        if self.reference and len(seen):
            seen = seen[:: max(1, len(seen) // _REFERENCE_TOKENS)]
        clip = name.rpartition(".")[2] not in UNCLIPPED and len(samples) > 0
        ratios = self.clip_ratios if clip else ()

        def clipped(weight: Tensor) -> UniformQuantizer:
            chosen = weight * within, seen, spec, ratios, inputs, self.reference
            quantizer = clipped_quantizer(*chosen)
            return quantizer if self.folded else _divided(quantizer, within)

        return block.quantize_linear(name, samples, input_quantizer=inputs, weights=clipped)


def _entry(
    block: Block,
    choices: Sequence[ChosenScale],
    unscaled: list[str],
    error: float | None,
    rtn_error: float | None,
    kept: str,
) -> dict[str, Any]:
    """The entry of a block in the report; errors are None if no calibration data reaches it."""
    return {
        "block": block.name,
        "scales": {choice.rescaling.source: choice.record() for choice in choices},
        "unscaled": unscaled,
        "error": error,
        "rtn_error": rtn_error,
        "kept": kept,
    }


def _divided(quantizer: UniformQuantizer, scale: Tensor) -> UniformQuantizer:
    """Turns the quantizer of W diag(s) into one of W: the same codes, with its scales divided by s.

    Each column then has a scale of its own. A simulation can compute that; an integer product would
    have to undo s on the way.
    """
    if quantizer.order is not None:
        scale = scale[quantizer.order]
    if quantizer.group_size is not None:
        scale = scale.view(-1, quantizer.group_size)
    scales = (quantizer.scale / scale).clamp_min(SMALLEST_SCALE)
    zero_points = quantizer.zero_point.expand(scales.shape).contiguous()
    return quantizer.with_scales(scales, zero_points)


def _output_error(block: Block, layers: dict[str, QuantLinear]) -> float:
    """The mean squared error of the block's output with these layers, which then stay in it."""
    target = block.float_outputs()
    for name, layer in layers.items():
        block.replace(name, layer)
    return mean_squared_error(block.run(), target)

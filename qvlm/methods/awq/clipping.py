"""Ranges of weights chosen by their effect on the output (AWQ's clipping, arXiv 2306.00978).

The MSE range estimator looks at the weight alone. Here each range is clipped to the ratio that
loses least of its share of the output on calibration data, which is also the criterion of AWQ's
released code (llm-awq). The candidates differ: llm-awq clamps weights symmetrically to a ratio of
max|w|, and here both ends of the min-max range are multiplied by the ratio. `reference` clips as
llm-awq does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qvlm.quantization.precision import settled, wide
from qvlm.quantization.quantizer import Quantizer, UniformQuantizer
from qvlm.quantization.ranges import RangeEstimator, minmax, weight_quantizer
from qvlm.quantization.spec import QuantSpec


def clipped_quantizer(
    weight: Tensor,
    seen: Tensor,
    spec: QuantSpec,
    ratios: Sequence[float],
    inputs: Quantizer | None = None,
    reference: bool = False,
) -> UniformQuantizer:
    """Searches the range of every scale for the least error of its share of the output.

    The share of weights w [n] with inputs x [tokens, n] is w . x. Its squared error over all tokens
    is d^T G d with d = w_hat - w and G = x^T x. Candidates are the default range and the min-max
    range times each ratio. An output row whose total error increases, because the errors of its
    groups add up, keeps its default ranges.

    Args:
        weight: Weight [out, in].
        seen: Inputs of the weight, [tokens, in].
        spec: Spec of the weight.
        ratios: Clipping ratios for min-max ranges. If there is none, the default ranges are kept.
        inputs: Quantizer of the layer's input, see `weight_quantizer`.
        reference: Whether to clip as llm-awq does: weights are clamped symmetrically to a ratio of
            max|w|, the default range is min-max, and no row keeps it for its total error.
    """
    default = weight_quantizer(weight, spec, minmax if reference else None, inputs)
    if not ratios:
        return default
    estimator = _clamped if reference else _scaled_minmax
    size = spec.group if spec.granularity == "per_group" else weight.shape[1]
    order = slice(None) if default.order is None else default.order
    # [groups, tokens, size]
    parts = wide(seen)[:, order].unflatten(1, (-1, size)).transpose(0, 1)
    gram = parts.mT @ parts

    def errors(quantizer: UniformQuantizer) -> Tensor:
        """Error of each scale's share, in the shape of the scales."""
        lost = (quantizer(weight) - weight)[:, order].unflatten(1, (-1, size)).transpose(0, 1)
        shares = ((lost @ gram) * lost).sum(2).T  # [out, groups]
        return settled(shares.view(default.scale.shape) if default.scale.ndim else shares.sum())

    least, scale, zero_point = errors(default), default.scale, default.zero_point
    for ratio in ratios:
        candidate = weight_quantizer(weight, spec, estimator(ratio), inputs)
        error = errors(candidate)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, candidate.scale, scale)
        zero_point = torch.where(better, candidate.zero_point, zero_point)
    if spec.granularity == "per_group" and not reference:
        chosen = default.with_scales(scale, zero_point)
        output_errors = [
            settled((wide(seen) @ (quantizer(weight) - weight).T).square().sum(0))
            for quantizer in (chosen, default)
        ]
        better = (output_errors[0] <= output_errors[1])[:, None, None]
        scale = torch.where(better, scale, default.scale)
        zero_point = torch.where(better, zero_point, default.zero_point)
    return default.with_scales(scale, zero_point)


def _clamped(ratio: float) -> RangeEstimator:
    """The min-max range of weights that are clamped to a ratio of the largest magnitude."""

    def estimator(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        lo, hi = minmax(groups, spec)
        largest = torch.maximum(-lo, hi) * ratio
        return torch.maximum(lo, -largest), torch.minimum(hi, largest)

    return estimator


def _scaled_minmax(ratio: float) -> RangeEstimator:
    """The range estimator that multiplies min-max ranges by a ratio."""

    def estimator(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        lo, hi = minmax(groups, spec)
        return lo * ratio, hi * ratio

    return estimator

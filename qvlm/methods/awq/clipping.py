"""Ranges of weights chosen by what they do to the output (AWQ's clipping, arXiv 2306.00978).

The lp-minimal rule looks at the weight alone. Here each range is clipped to the ratio that loses
least of its share of the output on calibration data, as the released code of AWQ does, by the same
share of the min-max range at both ends.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qvlm.quantization.quantizer import Quantizer, UniformQuantizer
from qvlm.quantization.ranges import minmax, weight_quantizer
from qvlm.quantization.spec import QuantSpec


def clipped_quantizer(
    weight: Tensor,
    seen: Tensor,
    spec: QuantSpec,
    ratios: Sequence[float],
    inputs: Quantizer | None = None,
) -> UniformQuantizer:
    """Searches the range of every scale for the least error of its share of the output.

    The share of weights w [n] with inputs x [tokens, n] is w . x; its squared error over all tokens
    is d^T G d with d = w_hat - w and G = x^T x. Candidates are the default range and min-max ranges
    times each ratio. A row whose whole output gets worse (the errors of its groups may add up)
    keeps the default.

    Args:
        weight: [out, in].
        seen: its inputs, [tokens, in].
        ratios: for min-max ranges; none keeps the default range.
        inputs: of the layer's input, see `weight_quantizer`.
    """
    default = weight_quantizer(weight, spec, inputs=inputs)
    if not ratios:
        return default
    size = spec.group_size if spec.granularity == "per_group" else weight.shape[1]
    order = slice(None) if default.order is None else default.order
    # [groups, tokens, size]
    parts = seen.float()[:, order].unflatten(1, (-1, size)).transpose(0, 1)
    gram = parts.mT @ parts

    def errors(quantizer: UniformQuantizer) -> Tensor:
        """Of each scale, in its shape."""
        lost = (quantizer(weight) - weight)[:, order].unflatten(1, (-1, size)).transpose(0, 1)
        shares = ((lost @ gram) * lost).sum(2).T  # [out, groups]
        return shares.view(default.scale.shape) if default.scale.ndim else shares.sum()

    least, scale, zero_point = errors(default), default.scale, default.zero_point
    for ratio in ratios:
        candidate = weight_quantizer(weight, spec, _shrunk(ratio), inputs)
        error = errors(candidate)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, candidate.scale, scale)
        zero_point = torch.where(better, candidate.zero_point, zero_point)
    if spec.granularity == "per_group":
        chosen = default.with_scales(scale, zero_point)
        output_errors = [
            (seen.float() @ (quantizer(weight) - weight).T).square().sum(0)
            for quantizer in (chosen, default)
        ]
        better = (output_errors[0] <= output_errors[1])[:, None, None]
        scale = torch.where(better, scale, default.scale)
        zero_point = torch.where(better, zero_point, default.zero_point)
    return default.with_scales(scale, zero_point)


def _shrunk(ratio: float) -> Callable[[Tensor, QuantSpec], tuple[Tensor, Tensor]]:
    """The range rule: min-max times a ratio."""

    def rule(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        lo, hi = minmax(groups, spec)
        return lo * ratio, hi * ratio

    return rule

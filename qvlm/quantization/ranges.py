"""Range estimators: from calibration values to the two ends of a quantizer's range.

A range estimator maps the values of each scale group to the ends of that group's range.
`activation_quantizer` and `weight_quantizer` gather the groups of a granularity, apply the
estimator and make the quantizer.

Every method starts from `mse`, the MSE range estimator with exponent p: both ends of the min-max
range are multiplied by one ratio of 1.0, 0.9 ... 0.4, and the ratio with the least sum of
|x - x_hat|^p wins. p is 2 by default. The released code of Q-VLM (arXiv 2410.08119) contains this
search with p = 0.5 but does not call it: its author says that it is not part of the final version
(issue 6 of that repository).

Not here: running statistics. The samples of one block are bounded and all in memory.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qvlm import validation
from qvlm.errors import UserError
from qvlm.quantization.position_quantizer import PositionQuantizer, require_positions
from qvlm.quantization.precision import settled
from qvlm.quantization.prompt_quantizer import PromptQuantizer
from qvlm.quantization.quantizer import (
    Quantizer,
    TokenQuantizer,
    UniformQuantizer,
    affine_grid,
)
from qvlm.quantization.spec import (
    ACTIVATION_GRANULARITIES,
    LARGEST_GROUP,
    WEIGHT_GRANULARITIES,
    QuantSpec,
)

RATIOS = tuple(tenths / 10 for tenths in range(10, 3, -1))

RangeEstimator = Callable[[Tensor, QuantSpec], tuple[Tensor, Tensor]]
"""Maps values [groups, n] and their spec to the ends (lo, hi) of each group's range, [groups]."""

# Number of elements that the search over ratios works on at a time, which bounds its memory.
_PIECE = 2**21


def minmax(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Estimates ranges as the smallest and largest value of each group and zero."""
    return groups.amin(1).float().clamp_max(0), groups.amax(1).float().clamp_min(0)


def mse(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Estimates ranges as min-max times the ratio of least |x - x_hat|^p, for each group."""
    lo, hi = minmax(groups, spec)
    best = settled(clipping_errors(groups, spec)).argmin(1)
    ratio = torch.tensor(RATIOS, device=groups.device)[best]
    return lo * ratio, hi * ratio


def percentile(fraction: float) -> RangeEstimator:
    """The range estimator that clips each group at its quantiles 1 - fraction and fraction.

    Raises:
        UserError: If the fraction is not above 0.5 and at most 1.
    """
    if not 0.5 < fraction <= 1:
        raise validation.refused("percentile", fraction, "a number above 0.5 and up to 1")

    def estimator(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        # Linear interpolation between neighbors, mirrored for the lower end.
        at = (groups.shape[1] - 1) * fraction
        beyond, weight = groups.shape[1] - int(at), at - int(at)

        def end(largest: bool) -> Tensor:
            outermost = groups.float().topk(beyond, 1, largest).values
            last, before = outermost[:, -1].double(), outermost[:, max(-2, -beyond)].double()
            return settled(last.lerp(before, weight))

        lo, hi = end(largest=False), end(largest=True)
        return lo.clamp_max(0), hi.clamp_min(0)

    return estimator


def clipping_errors(groups: Tensor, spec: QuantSpec) -> Tensor:
    """Computes the sum of |x - x_hat|^p of groups [groups, n] for each of `RATIOS`.

    Returns:
        Sums [groups, ratios], float64.
    """
    lo, hi = minmax(groups, spec)
    count, size = groups.shape
    rows = max(1, _PIECE // size)
    sums = torch.zeros(count, len(RATIOS), dtype=torch.float64, device=groups.device)
    for column, ratio in enumerate(RATIOS):
        scale, zero_point = affine_grid(lo * ratio, hi * ratio, spec.bits)
        for top in range(0, count, rows):
            part = slice(top, top + rows)
            grid = UniformQuantizer(spec.bits, scale[part, None], zero_point[part, None])
            for piece in groups[part].detach().split(_PIECE, dim=1):
                values = piece.float()
                distance = (grid(values) - values).abs_()
                if spec.p not in (0.5, 1, 2):  # other powers of float32 differ between machines
                    distance = distance.double()
                sums[part, column] += distance.pow_(spec.p).sum(1, dtype=torch.float64)
    return sums


def cluster_channels(lo: Tensor, hi: Tensor, width: int) -> Tensor:
    """Clusters channels of similar range, so that a few scales serve many channels.

    The idea is that of RPTQ (arXiv 2304.01089), which runs k-means on (lo, hi) and so gets clusters
    of any size. Here channels are sorted by hi - lo, equal ones by lo and then by position, and
    cut into clusters of equal size, which integer products can use. The order is ascending: if the
    last cluster is smaller, it holds the widest channels, so that outliers share their scale with
    the fewest.

    Args:
        lo, hi: Ends of each channel's range, [features].
        width: Number of channels in a cluster.

    Returns:
        Cluster of each channel, [features] integers from 0.
    """
    order = torch.argsort(lo.double(), stable=True)
    order = order[torch.argsort((hi.double() - lo.double())[order], stable=True)]
    clusters = torch.empty_like(order)
    clusters[order] = torch.arange(len(order), device=order.device) // width
    return clusters


def activation_quantizer(
    samples: Tensor, spec: QuantSpec, estimator: RangeEstimator | None = None
) -> Quantizer:
    """Makes the quantizer of a linear's input.

    Without a sample, nothing is known of static ranges, and ranges derived from the weight would be
    a guess. The quantizer is then a per-token one of the same bits.

    The ratio of a per-token quantizer is that of the least total |x - x_hat|^p over all sample
    tokens. With another estimator than `mse`, it is the estimated width as a share of the min-max
    width, both summed over the tokens.

    Args:
        samples: What the linear read during calibration, [tokens, features]; with ranges per
            position, all tokens of a sequence after those of another.
        spec: Spec of the activation.
        estimator: Range estimator. By default, the one that `spec.ranges` names.

    Raises:
        UserError: If the granularity is not one of activations, or sequences are not whole.
    """
    validation.one_of("activation granularity", spec.granularity, ACTIVATION_GRANULARITIES)
    estimator = estimator or _named_estimator(spec)
    samples, spec = samples.detach(), spec.for_width(samples.shape[-1])
    if spec.granularity == "per_channel_prompt":
        return PromptQuantizer(spec.bits)  # its ranges are made in the call and clip nothing
    if len(samples) == 0:
        return TokenQuantizer(spec.bits)
    match spec.granularity:
        case "per_token":
            return TokenQuantizer(spec.bits, _token_ratio(samples, spec, estimator))
        case "per_tensor":
            lo, hi = estimator(samples.reshape(1, -1), spec)
            return UniformQuantizer.from_range(lo[0], hi[0], spec.bits)
        case "per_channel":
            lo, hi = estimator(samples.T.contiguous(), spec)
            return UniformQuantizer.from_range(lo, hi, spec.bits, folds=True)
        case "per_position":
            positions = spec.positions or len(samples)
            require_positions(samples, positions)
            groups = samples.unflatten(0, (-1, positions)).transpose(0, 1).flatten(1)
            return PositionQuantizer.from_ends(*estimator(groups, spec), spec.bits)
        case _:
            clusters = cluster_channels(*minmax(samples.T, spec), spec.group)
            lo, hi = torch.empty(2, len(clusters), device=samples.device)
            for cluster in range(int(clusters.max()) + 1):
                members = clusters == cluster
                low, high = estimator(samples[:, members].reshape(1, -1), spec)
                lo[members], hi[members] = low, high
            return UniformQuantizer.from_range(lo, hi, spec.bits, clusters=clusters)


def weight_quantizer(
    weight: Tensor,
    spec: QuantSpec,
    estimator: RangeEstimator | None = None,
    inputs: Quantizer | None = None,
) -> UniformQuantizer:
    """Makes the quantizer of a weight.

    Args:
        weight: Weight [out, in].
        spec: Spec of the weight.
        estimator: Range estimator. By default, the one that `spec.ranges` names.
        inputs: Quantizer of the layer's input, which decides in which order channels are grouped
            (see `grouping_order`).

    Raises:
        UserError: If the granularity is not one of weights, or the group size does not divide `in`.
    """
    validation.one_of("weight granularity", spec.granularity, WEIGHT_GRANULARITIES)
    estimator = estimator or _named_estimator(spec)
    weight = weight.detach().float()
    rows, width = weight.shape
    spec = spec.for_width(width)
    if spec.granularity == "per_tensor":
        lo, hi = estimator(weight.reshape(1, -1), spec)
        return UniformQuantizer.from_range(lo[0], hi[0], spec.bits)
    if spec.granularity == "per_channel":
        lo, hi = estimator(weight, spec)
        return UniformQuantizer.from_range(lo[:, None], hi[:, None], spec.bits)
    check_group_size(width, spec)
    order = grouping_order(inputs, spec)
    grouped = weight if order is None else weight[:, order]
    lo, hi = estimator(grouped.reshape(-1, spec.group), spec)
    shape = (rows, width // spec.group, 1)
    return UniformQuantizer.from_range(
        lo.view(shape), hi.view(shape), spec.bits, group_size=spec.group_size, order=order
    )


def grouping_order(inputs: Quantizer | None, spec: QuantSpec) -> Tensor | None:
    """The order [in] in which a weight's input channels are grouped; None is their own order.

    If the input has clusters, channels are ordered by cluster, provided that each group of weights
    then lies within one cluster. All channels of a group so share both scales, and codes can be
    summed over the group. RPTQ (arXiv 2304.01089) reorders channels for the same reason.
    """
    clusters = inputs.clusters if isinstance(inputs, UniformQuantizer) else None
    if clusters is None or spec.granularity != "per_group":
        return None
    order = torch.argsort(clusters, stable=True)
    groups = clusters[order].view(-1, spec.for_width(len(clusters)).group)
    apart = bool(clusters.any()) and bool((groups == groups[:, :1]).all())
    return order if apart else None


def check_group_size(width: int, spec: QuantSpec, layer: str = "a weight") -> None:
    """Raises UserError if the group size of a weight spec does not divide the input `width`."""
    if spec.granularity == "per_group" and width % spec.for_width(width).group:
        raise UserError(
            f"group_size={spec.group_size} does not divide the {width} input features of {layer}. "
            f"Choose null, which is the largest divisor up to {LARGEST_GROUP}, or a divisor of "
            f"{width}"
        )


def _named_estimator(spec: QuantSpec) -> RangeEstimator:
    return mse if spec.ranges == "lp" else minmax


def _token_ratio(samples: Tensor, spec: QuantSpec, estimator: RangeEstimator) -> float:
    if estimator is mse:
        return RATIOS[int(settled(clipping_errors(samples, spec).sum(0)).argmin())]
    full_lo, full_hi = minmax(samples, spec)
    lo, hi = estimator(samples, spec)
    full = (full_hi.double() - full_lo.double()).sum()
    # A share of (nearly) zero would clip every token to zero, so it is bounded from below.
    if not full > 0:
        return 1.0
    return max(settled(float((hi.double() - lo.double()).sum() / full)), RATIOS[-1])

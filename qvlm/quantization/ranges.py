"""Where the ranges of a quantizer come from.

A range rule maps the values of each scale group to the two ends of its range; the functions
`activation_quantizer` and `weight_quantizer` gather the groups of a granularity, ask the rule and
build the quantizer.
The default rule is the one every method starts from: the lp-distance-minimal clipping, where both
ends of the min-max range are shrunk together by one ratio of 1.0, 0.9 ... 0.4 and the ratio of the
least sum of |x - x_hat|^p wins (p = 0.5 in the released code of Q-VLM, arXiv 2410.08119).

Left out on purpose: running statistics. The samples of one block are bounded and all at hand.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qvlm.errors import UserError
from qvlm.quantization.quantizer import (
    Quantizer,
    TokenQuantizer,
    UniformQuantizer,
    affine_grid,
)
from qvlm.quantization.spec import ACTIVATION_GRANULARITIES, WEIGHT_GRANULARITIES, QuantSpec

RATIOS = tuple(tenths / 10 for tenths in range(10, 3, -1))

Ranges = Callable[[Tensor, QuantSpec], tuple[Tensor, Tensor]]
"""Values [groups, n] and their spec to the ends (lo, hi) of each group's range, [groups] each."""

# Elements that the search over ratios works on at a time: bounds its memory to a few times this.
_PIECE = 2**21


def minmax(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The smallest and largest value of each group [groups, n], extended to hold zero."""
    return groups.amin(1).float().clamp_max(0), groups.amax(1).float().clamp_min(0)


def lp_minimal(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Min-max ranges of [groups, n] times the ratio of the least lp distance, per group."""
    lo, hi = minmax(groups, spec)
    best = lp_distances(groups, spec).argmin(1)
    ratio = torch.tensor(RATIOS, device=groups.device)[best]
    return lo * ratio, hi * ratio


def percentile(fraction: float) -> Ranges:
    """The rule that clips each group at its own quantiles 1 - fraction and fraction.

    Raises:
        UserError: if the fraction is not above 0.5 and at most 1.
    """
    if not 0.5 < fraction <= 1:
        raise UserError(f"percentile {fraction!r}: accepted are numbers above 0.5 and up to 1")

    def rule(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        # Linear interpolation between neighbours; mirrored for the lower end.
        at = (groups.shape[1] - 1) * fraction
        beyond, weight = groups.shape[1] - int(at), at - int(at)

        def end(largest: bool) -> Tensor:
            outermost = groups.float().topk(beyond, 1, largest).values
            return outermost[:, -1].lerp(outermost[:, max(-2, -beyond)], weight)

        lo, hi = end(largest=False), end(largest=True)
        return lo.clamp_max(0), hi.clamp_min(0)

    return rule


def lp_distances(groups: Tensor, spec: QuantSpec) -> Tensor:
    """Sum of |x - x_hat|^p of each group [groups, n] for each of `RATIOS`: [groups, ratios]."""
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
                distance = (grid(piece) - piece).abs_().pow_(spec.p)
                sums[part, column] += distance.sum(1, dtype=torch.float64)
    return sums


def cluster_channels(lo: Tensor, hi: Tensor, width: int) -> Tensor:
    """Groups channels of similar range, so that a few scales serve many (RPTQ, arXiv 2304.01089).

    Channels are sorted by hi - lo, equal ones by lo and then by position, and cut into runs of
    `width`. The order is ascending: if the last cluster is smaller, it holds the widest channels,
    and outliers share their scale with the fewest.

    Args:
        lo, hi: ends of each channel's range, [features].
        width: channels in a cluster.

    Returns:
        The cluster of each channel, [features] integers from 0.
    """
    order = torch.argsort(lo.double(), stable=True)
    order = order[torch.argsort((hi.double() - lo.double())[order], stable=True)]
    clusters = torch.empty_like(order)
    clusters[order] = torch.arange(len(order), device=order.device) // width
    return clusters


def activation_quantizer(
    samples: Tensor, spec: QuantSpec, ranges: Ranges | None = None
) -> Quantizer:
    """The quantizer of a linear's input.

    Without any sample nothing is known about static ranges, and inventing them from the weight
    would be a guess; the quantizer is then a per-token one of the same bits. A per-token
    quantizer takes from the rule one ratio: the least total lp distance over all sample tokens,
    or, for a rule other than `lp_minimal`, the rule's share of the tokens' min-max widths.

    Args:
        samples: what the linear saw during calibration, [tokens, features].
        ranges: the rule; by default the one that `spec.ranges` names.

    Raises:
        UserError: if the granularity is not one of activations.
    """
    _check_granularity("activation", spec, ACTIVATION_GRANULARITIES)
    rule = ranges or _named_rule(spec)
    samples = samples.detach()
    if len(samples) == 0:
        return TokenQuantizer(spec.bits)
    match spec.granularity:
        case "per_token":
            return TokenQuantizer(spec.bits, _token_ratio(samples, spec, rule))
        case "per_tensor":
            lo, hi = rule(samples.reshape(1, -1), spec)
            return UniformQuantizer.from_range(lo[0], hi[0], spec.bits)
        case "per_channel":
            lo, hi = rule(samples.T.contiguous(), spec)
            return UniformQuantizer.from_range(lo, hi, spec.bits, folds=True)
        case _:
            clusters = cluster_channels(*minmax(samples.T, spec), spec.group_size)
            lo, hi = torch.empty(2, len(clusters), device=samples.device)
            for cluster in range(int(clusters.max()) + 1):
                members = clusters == cluster
                low, high = rule(samples[:, members].reshape(1, -1), spec)
                lo[members], hi[members] = low, high
            return UniformQuantizer.from_range(lo, hi, spec.bits, clusters=clusters)


def weight_quantizer(
    weight: Tensor, spec: QuantSpec, ranges: Ranges | None = None, inputs: Quantizer | None = None
) -> UniformQuantizer:
    """The quantizer of a weight [out, in].

    Args:
        ranges: the rule; by default the one that `spec.ranges` names.
        inputs: of the layer's input: decides in which order channels are grouped
            (`grouping_order`).

    Raises:
        UserError: if the granularity is not one of weights or the group does not divide `in`.
    """
    _check_granularity("weight", spec, WEIGHT_GRANULARITIES)
    rule = ranges or _named_rule(spec)
    weight = weight.detach().float()
    rows, width = weight.shape
    if spec.granularity == "per_tensor":
        lo, hi = rule(weight.reshape(1, -1), spec)
        return UniformQuantizer.from_range(lo[0], hi[0], spec.bits)
    if spec.granularity == "per_channel":
        lo, hi = rule(weight, spec)
        return UniformQuantizer.from_range(lo[:, None], hi[:, None], spec.bits)
    check_group_size(width, spec)
    order = grouping_order(inputs, spec)
    grouped = weight if order is None else weight[:, order]
    lo, hi = rule(grouped.reshape(-1, spec.group_size), spec)
    shape = (rows, width // spec.group_size, 1)
    return UniformQuantizer.from_range(
        lo.view(shape), hi.view(shape), spec.bits, group_size=spec.group_size, order=order
    )


def grouping_order(inputs: Quantizer | None, spec: QuantSpec) -> Tensor | None:
    """The order in which a weight's input channels are grouped, [in]; None is their own.

    Channels go cluster by cluster where the input has clusters and each group of weights then lies
    in one: all channels of a group share both scales, and integers can be summed over it. RPTQ
    (arXiv 2304.01089) moves channels together for the same reason.
    """
    clusters = inputs.clusters if isinstance(inputs, UniformQuantizer) else None
    if clusters is None or spec.granularity != "per_group":
        return None
    order = torch.argsort(clusters, stable=True)
    groups = clusters[order].view(-1, spec.group_size)
    apart = bool(clusters.any()) and bool((groups == groups[:, :1]).all())
    return order if apart else None


def check_group_size(width: int, spec: QuantSpec, layer: str = "a weight") -> None:
    """Raises UserError if the groups of a weight spec do not divide its input `width`."""
    if spec.granularity == "per_group" and width % spec.group_size:
        raise UserError(
            f"group_size={spec.group_size} does not divide the {width} input features of {layer}: "
            f"accepted are divisors of {width}"
        )


def _named_rule(spec: QuantSpec) -> Ranges:
    return lp_minimal if spec.ranges == "lp" else minmax


def _token_ratio(samples: Tensor, spec: QuantSpec, rule: Ranges) -> float:
    if rule is lp_minimal:
        return RATIOS[int(lp_distances(samples, spec).sum(0).argmin())]
    full_lo, full_hi = minmax(samples, spec)
    lo, hi = rule(samples, spec)
    full = (full_hi.double() - full_lo.double()).sum()
    # A share of (nearly) nothing would clip every token to zero: no rule may ask for that.
    return max(float((hi.double() - lo.double()).sum() / full), RATIOS[-1]) if full > 0 else 1.0


def _check_granularity(kind: str, spec: QuantSpec, accepted: tuple[str, ...]) -> None:
    if spec.granularity not in accepted:
        raise UserError(
            f"{kind} granularity={spec.granularity!r}: accepted are {', '.join(accepted)}"
        )

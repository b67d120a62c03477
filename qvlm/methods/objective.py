"""The error of a module's outputs, which every search over calibration data minimizes."""

from collections.abc import Iterable, Sequence
from math import inf

import torch
from torch import Tensor


def output_error(
    outputs: Iterable[Tensor], targets: Sequence[Tensor], normalize: bool, bound: float = inf
) -> float:
    """Computes the squared error per token, or its mean share of a token's energy.

    Outputs are asked for one after the other, and no more once the error is certain to be above
    `bound`.

    Args:
        outputs: Outputs [..., features] of the calls, in the order of `targets`.
        targets: Outputs [..., features] of the float module.
        normalize: Whether a token's squared error is divided by the energy of its target.
        bound: Largest error of interest.

    Returns:
        The error, or infinity if it is above `bound`.
    """
    total = 0.0
    count = max(1, sum(target.shape[:-1].numel() for target in targets))
    for output, target in zip(outputs, targets, strict=True):
        errors = (output.float() - target.float()).square().sum(-1)
        if normalize:
            errors = errors / target.float().square().sum(-1).clamp_min(1e-20)
        total += float(errors.sum(dtype=torch.float64))
        if total / count > bound:
            return inf
    return total / count


def mean_squared_error(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    """Computes the mean squared error of the elements of all calls; 0 for no call at all."""
    total = sum(
        float((output.double() - target.double()).square().sum())
        for output, target in zip(outputs, targets, strict=True)
    )
    return total / max(1, sum(target.numel() for target in targets))

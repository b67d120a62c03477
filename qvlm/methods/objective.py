"""The error of a module's outputs, which every search over calibration data minimizes.

Without data, every candidate would have error 0 and the first one would win. Both errors are
therefore refused without a target, and methods have to name what they cannot search.

Errors are compared, so they are summed in float64 and rounded to float32: see
`qvlm.quantization.precision`.
"""

from collections.abc import Iterable, Sequence
from math import inf

import torch
from torch import Tensor

from qvlm.errors import RunError
from qvlm.quantization.precision import settled, wide


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

    Raises:
        RunError: If the targets contain no token.
    """
    total = 0.0
    count = _counted(sum(target.shape[:-1].numel() for target in targets))
    for output, target in zip(outputs, targets, strict=True):
        wanted = wide(target)
        errors = (wide(output) - wanted).square().sum(-1)
        if normalize:
            errors = errors / wanted.square().sum(-1).clamp_min(1e-20)
        total += float(errors.sum(dtype=torch.float64))
        # Settled, as the bound is: an error as large as the bound must not be above it.
        if settled(total / count) > bound:
            return inf
    return settled(total / count)


def mean_squared_error(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    """Computes the mean squared error of the elements of all calls.

    Raises:
        RunError: If the targets contain no element.
    """
    count = _counted(sum(target.numel() for target in targets))
    total = sum(
        float((output.double() - target.double()).square().sum())
        for output, target in zip(outputs, targets, strict=True)
    )
    return settled(total / count)


def _counted(count: int) -> int:
    if count == 0:
        raise RunError("a search has no calibration data to measure an error on")
    return count

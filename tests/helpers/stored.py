"""The weight that stored codes stand for, in plain arithmetic."""

import torch
from torch import Tensor

from qvlm.proving.stored import StoredWeight


def rows_of_values(weight: StoredWeight) -> Tensor:
    """Returns the value of each code, [scales, members] float32."""
    codes = weight.codes.long()
    if weight.levels is not None:
        steps = weight.levels[codes]
    elif weight.zero_point is None:
        steps = (codes - weight.fixed_zero).float()
    else:
        steps = codes.float() - weight.zero_point[:, None].float()
    values = steps * weight.scale.float()[:, None]
    return values if weight.minimum is None else values + weight.minimum.float()[:, None]


def dequantized(weight: StoredWeight) -> Tensor:
    """Returns a weight whose rows of scales follow each other, [out, in] float32."""
    values = rows_of_values(weight).flatten()
    return values[: int(torch.tensor(weight.shape).prod())].view(weight.shape)

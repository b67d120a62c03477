"""Which numbers are float64, and where they are rounded to float32 so that machines agree.

Sums differ between instruction sets and numbers of threads, because their terms are added in
another order: in the seventh digit in float32, in the sixteenth in float64. Quantization turns such
a difference into another code, and a sort or a search into another choice. A model in float64
therefore computes in float64, and whatever is stored, sorted, compared or rounded to a code is
first rounded to float32. Two values that agree to sixteen digits then become the same number,
except with a probability of about 1e-8.

Elementwise arithmetic in float32 is the same everywhere (IEEE 754), as long as no function is
called and nothing is added up. So a code is float32 division and rounding. This matters where the
quotient lies half way between two codes by construction: at the ends of a range that is symmetric
about zero it is k + 0.5, and a float64 quotient would fall on either side of it.

A model in another type computes as it always did, in float32.
"""

from typing import overload

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)  # the types of 16 bits


def wide(x: Tensor) -> Tensor:
    """Returns `x` in the type to compute in: float64 if it is float64, otherwise float32."""
    return x if x.dtype == torch.float64 else x.float()


@overload
def settled(x: Tensor) -> Tensor: ...


@overload
def settled(x: float) -> float: ...


def settled(x: Tensor | float) -> Tensor | float:
    """Rounds to float32 what is stored, sorted or compared.

    Args:
        x: Tensor or number.

    Returns:
        A float32 tensor of the shape of `x`, or the rounded number.
    """
    return (
        x.float() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64).float().item()
    )

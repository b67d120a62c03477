"""The Hadamard transform: an orthogonal map that spreads what one channel holds over all of them.

A width is written as m * 2^k. The power of two takes the Walsh-Hadamard matrix, whose product is k
passes of sums and differences instead of a multiplication (fast Walsh-Hadamard transform). The rest
m is multiplied with a small matrix: Paley's Hadamard matrix of order q + 1, for a prime q with
q = 3 mod 4, if 4m, 8m, ... up to `LARGEST_FACTOR` is such an order (the factors of two are taken
from 2^k), and otherwise the orthonormal cosine matrix (DCT-II). So 384 is 12 * 32, 576 is 72 * 8,
5,120 is 20 * 256, 13,824 is 108 * 128, and 11,008, which has no such order, is 43 * 256. QuaRot
(arXiv 2404.00456) takes tabulated Hadamard matrices instead; the idea is the same.

The first row of every matrix here is constant. A rotation that keeps the mean of the channels is
therefore H^T diag(signs) H with a first sign of one.

The transform is computed in float64 for float64 inputs and in float32 for all others. Sums and
differences of a pass have one order, so a width that is a power of two gives equal bits on every
machine.

Left out: a transform of blocks of the channels. Packed layers have the passes in C.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

# Largest matrix that is multiplied with instead of taking the cosine matrix of a width's odd part.
LARGEST_FACTOR = 512


def hadamard_transform(
    x: Tensor, inverse: bool = False, passes: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Multiplies vectors with the orthonormal Hadamard matrix H of their width.

    Args:
        x: Vectors [..., width] in any floating-point type.
        inverse: Whether to multiply with the transpose of H, which undoes it.
        passes: Function that computes `walsh_hadamard` to the bit, for a kernel's; None is it.

    Returns:
        Vectors [..., width], float64 for a float64 input and float32 otherwise.
    """
    width = x.shape[-1]
    small, fast = factors(width)
    x = x if x.dtype == torch.float64 else x.float()
    x = x.reshape(*x.shape[:-1], small, fast)
    x = (passes or walsh_hadamard)(x)
    if small > 1:
        matrix = _placed(small, x.dtype, x.device)
        x = (matrix.T if inverse else matrix) @ x
    return x.flatten(-2) * (1 / math.sqrt(fast))


def walsh_hadamard(x: Tensor) -> Tensor:
    """Multiplies vectors [..., width] with the Walsh-Hadamard matrix: entries of +1 and -1.

    The matrix is in natural order. `width` is a power of two, whose passes take neighbors first.
    """
    half, width = 1, x.shape[-1]
    while half < width:
        pairs = x.unflatten(-1, (-1, 2, half))
        first, second = pairs.unbind(-2)
        x = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        half *= 2
    return x


@functools.cache
def factors(width: int) -> tuple[int, int]:
    """Writes a width as the order of a small matrix times a power of two.

    Returns:
        Order of the small matrix (1 for a power of two), and the power of two.
    """
    odd = width // (width & -width)
    if odd == 1:
        return 1, width
    order = 4 * odd
    while width % order == 0 and order <= LARGEST_FACTOR:
        if _is_prime(order - 1):
            return order, width // order
        order *= 2
    return odd, width // odd


@functools.cache
def _placed(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The small matrix of an order where it is multiplied with."""
    return small_matrix(order).to(device, dtype)


def small_matrix(order: int) -> Tensor:
    """The orthonormal matrix of an order that `factors` returns, [order, order] float64."""
    if order % 4 == 0:
        return paley(order) / math.sqrt(order)
    index = torch.arange(order, dtype=torch.float64)
    matrix = torch.cos(math.pi / order * index[:, None] * (index + 0.5)) * math.sqrt(2 / order)
    matrix[0] /= math.sqrt(2)
    return matrix


def paley(order: int) -> Tensor:
    """Paley's Hadamard matrix (his first construction): entries of +1 and -1, first row all ones.

    Args:
        order: q + 1 for a prime q with q = 3 mod 4.

    Returns:
        Matrix [order, order] float64 with orthogonal rows.
    """
    q = order - 1
    residue = torch.full((q,), -1.0, dtype=torch.float64)
    residue[torch.arange(1, q).square() % q] = 1.0
    residue[0] = 0.0
    index = torch.arange(q)
    skew = torch.ones(order, order, dtype=torch.float64)
    skew[0, 0] = 0.0
    skew[1:, 0] = -1.0
    skew[1:, 1:] = residue[(index[:, None] - index) % q]
    return skew + torch.eye(order, dtype=torch.float64)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))

"""Muon (K. Jordan and others, 2024) in float32.

PyTorch's Muon makes an update orthogonal in bfloat16. A CPU without AVX-512 multiplies that eight
times slower than float32, and most of a training step went there.
"""

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """PyTorch's Muon, with Nesterov momentum and the rate of its paper, in the type of a matrix.

    Options and state are those of `torch.optim.Muon`, which it must match but for rounding.
    """

    # Ours needs no closure, and PyTorch's wrapper of `step` hides the types.
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Takes one step along the orthogonal factors of momentum."""
        assert closure is None
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                momentum = state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonal(
                    matrix.grad.lerp(momentum, group["momentum"]),
                    group["ns_coefficients"],
                    group["ns_steps"],
                    group["eps"],
                )
                rate = group["lr"] * sqrt(max(1.0, matrix.shape[0] / matrix.shape[1]))
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


def orthogonal(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, least: float
) -> Tensor:
    """Brings the singular values of a matrix near 1 by a quintic Newton-Schulz iteration.

    Args:
        matrix: Matrix [rows, columns].
        coefficients: Coefficients a, b and c of the iteration X <- aX + b(XX')X + c(XX')^2 X.
        steps: Number of iterations.
        least: Least norm that the matrix is divided by.

    Returns:
        Matrix [rows, columns] with the same singular vectors.
    """
    a, b, c = coefficients
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    found = wide / wide.norm().clamp(min=least)
    for _ in range(steps):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found if wide is matrix else found.T

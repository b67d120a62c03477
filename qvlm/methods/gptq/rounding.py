"""GPTQ's rounding of one weight (arXiv 2210.17323, section 3 and algorithm 1).

The columns of a weight are rounded one after the other. The error of a column is made up for by the
columns that are not rounded yet, in proportions that follow from the inputs X [tokens, in]:

    minimize  tr((W - Q) G (W - Q)^T),    G = X^T X

G is that of quantized inputs, so that rounding minimizes the error of what the quantized layer
multiplies. (Inputs of the float layer as the target, as GPTAQ, arXiv 2504.02692, has them, were
worse here; see docs/LOG.md.) A share of G's mean diagonal is added to its diagonal (damping), and
columns come in falling order of the diagonal if asked for (`act-order` of the released code).

Scales are those of the range estimator that all methods share, made before the rounding ("static
groups"), so that groups may follow the clusters of the input and any order of columns is possible.
A row that compensation makes worse than rounding to nearest is rounded to nearest. No row is
therefore worse than RTN on the objective.
"""

import torch
from torch import Tensor

from qvlm.quantization.precision import settled
from qvlm.quantization.quantizer import UniformQuantizer

# Columns whose errors are applied to the columns after them together (lazy batch updates).
_BATCH = 128


@torch.no_grad()
def compensated_rounding(
    weight: Tensor,
    gram: Tensor,
    quantizer: UniformQuantizer,
    damping: float = 0.01,
    activation_order: bool = True,
) -> Tensor:
    """Rounds a weight so that the errors of its columns cancel on the inputs.

    Args:
        weight: Weight W [out, in].
        gram: Gram matrix G of the inputs, [in, in].
        quantizer: Quantizer of the weight.
        damping: Share of the mean of G's diagonal that is added to the diagonal.
        activation_order: Whether columns are rounded in falling order of G's diagonal.

    Returns:
        Weight on the grid of the quantizer, [out, in] in the type of `weight`.
    """
    nearest = quantizer(weight)
    gram, weight = gram.double(), weight.double()
    energy = gram.diag()
    if not float(energy.mean()) > 0:
        return nearest
    scale, zero_point = (part.double() for part in quantizer.grids(weight))
    bounds = -zero_point, 2**quantizer.bits - 1 - zero_point
    order = torch.arange(len(energy), device=gram.device)
    if activation_order:
        order = torch.argsort(settled(energy), descending=True, stable=True)
    damped = gram + torch.eye(len(energy)).to(gram) * damping * energy.mean()
    steps = _compensate(
        weight[:, order],
        scale[:, order],
        (bounds[0][:, order], bounds[1][:, order]),
        _inverse_factor(damped[order][:, order]),
    )
    rounded = torch.empty_like(nearest)
    rounded[:, order] = steps.to(nearest.dtype) * scale[:, order].to(nearest.dtype)
    better = objective(weight, rounded, gram) <= objective(weight, nearest, gram)
    return torch.where(better[:, None], rounded, nearest)


def objective(weight: Tensor, rounded: Tensor, gram: Tensor) -> Tensor:
    """Computes the squared output error of each row, [out] float32."""
    error = rounded.double() - weight.double()
    return settled(((error @ gram.double()) * error).sum(1))


def _inverse_factor(gram: Tensor) -> Tensor:
    """The upper triangular U with U^T U = G^-1 (section 3, step 3)."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return torch.linalg.cholesky(inverse, upper=True)


def _compensate(
    weight: Tensor, scale: Tensor, bounds: tuple[Tensor, Tensor], factor: Tensor
) -> Tensor:
    """Rounds columns from left to right (algorithm 1).

    Args:
        weight: Weight [out, in] float64, whose columns are in the order of rounding.
        scale: Scale of each weight, [out, in] float64.
        bounds: Least and largest number of steps from zero, each [out, in].
        factor: U [in, in].

    Returns:
        Steps from zero, [out, in] float64.
    """
    weight, steps = weight.clone(), torch.empty_like(weight)
    width = weight.shape[1]
    for start in range(0, width, _BATCH):
        end = min(start + _BATCH, width)
        errors = torch.empty_like(weight[:, start:end])
        for column in range(start, end):
            # float32 decides which step is nearest, so that all machines agree.
            nearest = settled(weight[:, column] / scale[:, column]).round().double()
            nearest = nearest.maximum(bounds[0][:, column]).minimum(bounds[1][:, column])
            steps[:, column] = nearest
            error = weight[:, column] - nearest * scale[:, column]
            error /= factor[column, column]
            weight[:, column + 1 : end] -= error[:, None] * factor[column, column + 1 : end]
            errors[:, column - start] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    return steps

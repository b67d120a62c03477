"""Rounding with compensation against the slow algorithm that GPTQ speeds up, code by code."""

import numpy as np
import pytest
import torch
from torch import Tensor

from qvlm.methods.gptq.rounding import compensated_rounding, objective
from qvlm.quantization.quantizer import UniformQuantizer
from qvlm.quantization.ranges import activation_quantizer, weight_quantizer
from qvlm.quantization.spec import QuantSpec


def problem(width: int = 48, rows: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [rows, width], and the gram matrix of correlated inputs whose channels differ."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=random, dtype=torch.float64)
    x = torch.randn(300, width, generator=random, dtype=torch.float64) @ mix
    x *= torch.rand(width, generator=random, dtype=torch.float64) * 3
    return torch.randn(rows, width, generator=random), x.T @ x


def optimal_brain_quantizer(
    weight: np.ndarray, gram: np.ndarray, quantizer: UniformQuantizer, damping: float, order: bool
) -> np.ndarray:
    """Optimal brain quantization in a fixed order: the inverse is updated by elimination each time.

    Equations 2 and 3 of GPTQ's paper (arXiv 2210.17323), without its Cholesky factor.
    """
    width = len(gram)
    scale = np.empty_like(weight)
    zero = np.empty_like(weight)
    group = quantizer.group_size or width
    channels = np.arange(width) if quantizer.order is None else quantizer.order.numpy()
    for row in range(len(weight)):
        for place, channel in enumerate(channels):
            at = (row, place // group, 0) if quantizer.group_size else (row, 0)
            scale[row, channel] = quantizer.scale[at]
            zero[row, channel] = quantizer.zero_point[at]
    columns = list(np.argsort(-np.diag(gram).astype(np.float32), kind="stable"))
    columns = columns if order else list(range(width))
    damped = gram + damping * np.mean(np.diag(gram)) * np.eye(width)
    inverse = np.linalg.inv(damped)
    left, codes = weight.copy(), np.empty(weight.shape, dtype=int)
    for column in columns:
        q = np.rint((left[:, column] / scale[:, column]).astype(np.float32)) + zero[:, column]
        codes[:, column] = np.clip(q, 0, 2**quantizer.bits - 1)
        rounded = (codes[:, column] - zero[:, column]) * scale[:, column]
        error = (left[:, column] - rounded) / inverse[column, column]
        left -= error[:, None] * inverse[column]
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("granularity", ["per_channel", "per_group", "clusters"])
def test_codes_are_those_of_the_slow_algorithm(granularity: str, order: bool) -> None:
    weight, gram = problem(width=160)  # more columns than one batch of updates
    inputs = None
    if granularity == "clusters":
        samples = torch.randn(64, 160) * torch.rand(160)
        inputs = activation_quantizer(samples, QuantSpec(4, "per_channel_group", 32))
    spec = QuantSpec(3, "per_channel" if granularity == "per_channel" else "per_group", 32)
    quantizer = weight_quantizer(weight, spec, inputs=inputs)
    assert (quantizer.order is not None) == (granularity == "clusters")
    found = compensated_rounding(weight, gram, quantizer, 0.01, order)
    expected = optimal_brain_quantizer(
        weight.double().numpy(), gram.numpy(), quantizer, 0.01, order
    )
    nearest = quantizer(weight)
    compensated = objective(weight, found, gram) < objective(weight, nearest, gram)
    assert compensated.all()  # no row fell back
    assert np.array_equal(quantizer.quantize(found).numpy(), expected)
    assert torch.equal(quantizer(found), found)  # the result lies on the grid


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_row_is_worse_than_rounding_to_nearest(bits: int, seed: int) -> None:
    weight, gram = problem(width=24, rows=64, seed=seed)
    gram = gram[:, :].clone()
    gram[3] = gram[:, 3] = 0  # a channel that is always zero
    quantizer = weight_quantizer(weight, QuantSpec(bits, "per_channel"))
    found = compensated_rounding(weight, gram, quantizer, damping=1e-4)
    errors, nearest = (objective(weight, q, gram) for q in (found, quantizer(weight)))
    assert bool((errors <= nearest).all())
    assert float(errors.sum()) < float(nearest.sum())


def test_a_row_that_compensation_makes_worse_is_rounded_to_nearest() -> None:
    """Damping far above the gram matrix itself compensates for correlations that are not there."""
    weight, gram = problem(width=24, rows=512)
    quantizer = weight_quantizer(weight, QuantSpec(2, "per_channel"))
    found, nearest = compensated_rounding(weight, gram, quantizer, 3.0), quantizer(weight)
    fallen = (found == nearest).all(1)
    assert bool(fallen.any()) and not bool(fallen.all())


def test_independent_channels_are_rounded_to_nearest() -> None:
    weight, _ = problem()
    quantizer = weight_quantizer(weight, QuantSpec(4, "per_channel"))
    gram = torch.diag(torch.rand(48, dtype=torch.float64) + 0.1)
    assert torch.equal(compensated_rounding(weight, gram, quantizer), quantizer(weight))


def test_without_any_energy_nothing_is_compensated() -> None:
    weight, _ = problem()
    quantizer = weight_quantizer(weight, QuantSpec(4, "per_channel"))
    found = compensated_rounding(weight, torch.zeros(48, 48), quantizer)
    assert torch.equal(found, quantizer(weight))


def test_two_equal_channels_share_one_error() -> None:
    """If a channel's twin carries its error, the sum of both weights is right to half a step."""
    weight = torch.tensor([[0.34, 0.34, -1.0, 1.0]])
    x = torch.randn(50, 3, dtype=torch.float64)
    x = torch.stack([x[:, 0], x[:, 0], x[:, 1], x[:, 2]], dim=1)
    quantizer = UniformQuantizer(3, torch.tensor([[0.3]]), torch.tensor([[4.0]]))
    found = compensated_rounding(weight, x.T @ x, quantizer, damping=1e-6)
    assert found[0, :2].tolist() == pytest.approx([0.3, 0.3])
    worse = torch.tensor([[0.45, 0.45, -0.9, 0.9]])
    found = compensated_rounding(worse, x.T @ x, quantizer, damping=1e-6)
    assert found[0, :2].sum().item() == pytest.approx(0.9)

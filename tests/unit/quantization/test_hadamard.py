"""The Hadamard transform against a matrix that is written out, for every kind of width."""

import numpy as np
import pytest
import torch

from qvlm.quantization.hadamard import factors, hadamard_transform, paley

WIDTHS = (1, 2, 6, 8, 12, 20, 28, 43, 80, 96, 128, 384, 576)


def sylvester(order: int) -> np.ndarray:
    """The Walsh-Hadamard matrix by its definition: (-1) to the number of common bits."""
    common = np.arange(order)[:, None] & np.arange(order)
    return (-1.0) ** np.vectorize(lambda bits: bin(bits).count("1"))(common)


@pytest.mark.parametrize("order", [2, 8, 64])
def test_a_power_of_two_has_the_walsh_hadamard_matrix(order: int) -> None:
    x = torch.randn(3, order, dtype=torch.float64)
    expected = x.numpy() @ sylvester(order).T / np.sqrt(order)
    assert np.allclose(hadamard_transform(x).numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_matrix_is_orthogonal_and_its_first_row_constant(width: int) -> None:
    matrix = hadamard_transform(torch.eye(width, dtype=torch.float64)).T
    assert torch.allclose(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(matrix[0], torch.full((width,), width**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_inverse_undoes_it(width: int) -> None:
    x = torch.randn(2, 3, width, dtype=torch.float64)
    assert torch.allclose(hadamard_transform(hadamard_transform(x), inverse=True), x, atol=1e-12)


@pytest.mark.parametrize("order", [4, 12, 20, 44, 72, 108])
def test_paleys_matrices_are_hadamard_matrices(order: int) -> None:
    matrix = paley(order)
    assert set(matrix.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (4096, (1, 4096)),
        (384, (12, 32)),
        (576, (72, 8)),
        (5120, (20, 256)),
        (5632, (44, 128)),
        (13824, (108, 128)),
        (11008, (43, 256)),  # 172, 344 and 688 are not one more than a prime: a cosine matrix
        (7, (7, 1)),
    ],
)
def test_widths_of_models_take_small_matrices(width: int, expected: tuple[int, int]) -> None:
    assert factors(width) == expected


def test_an_outlier_is_spread_evenly() -> None:
    x = torch.zeros(576)
    x[17] = 24.0
    assert torch.allclose(hadamard_transform(x).abs(), torch.ones(576), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shorter_types_are_transformed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(4, 96).to(dtype)
    found = hadamard_transform(x)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), hadamard_transform(x.double()), atol=1e-5)


def test_rows_do_not_depend_on_each_other() -> None:
    x = torch.randn(7, 256)
    alone = torch.cat([hadamard_transform(row[None]) for row in x])
    assert torch.equal(hadamard_transform(x), alone)

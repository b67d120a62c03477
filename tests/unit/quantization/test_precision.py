"""What is rounded to float32, so that differences in the last digits of float64 decide nothing."""

import math

import pytest
import torch
from torch import Tensor, nn

from qvlm.methods.objective import mean_squared_error, output_error
from qvlm.quantization.linear import QuantLinear, folded_weight
from qvlm.quantization.precision import settled, wide
from qvlm.quantization.quantizer import TokenQuantizer, UniformQuantizer
from qvlm.quantization.ranges import activation_quantizer, mse, percentile, weight_quantizer
from qvlm.quantization.spec import ACTIVATION_GRANULARITIES, QuantSpec


def jittered(x: Tensor, seed: int) -> Tensor:
    """The same numbers with another sixteenth digit, as another instruction set leaves them."""
    random = torch.Generator().manual_seed(seed)
    return x * (1 + 2.0**-52 * torch.randint(-2, 3, x.shape, generator=random))


@pytest.fixture
def samples() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(300, 64, dtype=torch.float64) * torch.rand(64, dtype=torch.float64)


def test_settled_and_wide() -> None:
    assert settled(torch.tensor([1 / 3], dtype=torch.float64)).dtype == torch.float32
    assert settled(1 / 3) == float(torch.tensor(1 / 3)) != 1 / 3
    assert settled(1 + 1e-15) == 1.0
    assert settled(math.inf) == math.inf
    for dtype, computed in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        assert wide(torch.ones(1, dtype=dtype)).dtype == computed


@pytest.mark.parametrize("granularity", ACTIVATION_GRANULARITIES)
@pytest.mark.parametrize("ranges", ["lp", "minmax"])
def test_grids_are_equal_to_the_bit(samples: Tensor, granularity: str, ranges: str) -> None:
    spec = QuantSpec(4, granularity, 16, ranges=ranges)
    expected = activation_quantizer(samples, spec)
    for seed in range(3):
        found = activation_quantizer(jittered(samples, seed), spec)
        assert found.state_dict().keys() == expected.state_dict().keys()
        for name, tensor in expected.state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor), name
        if isinstance(expected, TokenQuantizer):
            assert isinstance(found, TokenQuantizer)
            assert found.ratio == expected.ratio


@pytest.mark.parametrize("estimator", [mse, percentile(0.99), percentile(0.9)])
def test_ranges_are_equal_to_the_bit(samples: Tensor, estimator: object) -> None:
    spec = QuantSpec(4, "per_channel")
    for seed in range(3):
        for found, expected in zip(
            estimator(jittered(samples, seed).T, spec),  # type: ignore[operator]
            estimator(samples.T, spec),  # type: ignore[operator]
            strict=True,
        ):
            assert torch.equal(found, expected)


def test_a_value_half_way_between_two_codes_has_one_code() -> None:
    """The largest value of a symmetric range lies at 7.5 steps, give or take the last digit."""
    for largest in torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1)):
        x = torch.stack([-largest, largest])
        grid = UniformQuantizer.from_range(*settled(x), 4)
        codes = {tuple(grid.quantize(jittered(x, seed)).tolist()) for seed in range(5)}
        assert len(codes) == 1


@pytest.mark.parametrize("granularity", ACTIVATION_GRANULARITIES)
def test_a_layer_in_float64_multiplies_codes_times_scales_without_rounding(
    samples: Tensor, granularity: str
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 8).double()
    inputs = activation_quantizer(samples, QuantSpec(4, granularity, 16, positions=20))
    weights = weight_quantizer(folded_weight(linear.weight, inputs), QuantSpec(4, "per_group", 16))
    layer = QuantLinear.from_linear(linear, weights, inputs)
    x = samples[:20]
    static = inputs.for_tokens(x)
    x_hat = static.dequantize(static.quantize(x), torch.float64)
    if inputs.folds:
        x_hat = x_hat / static.scale
    w_hat = weights.dequantize(layer.weight_codes(), torch.float64)
    assert layer.weight is not None
    assert torch.equal(layer.weight, w_hat)
    expected = (x_hat @ w_hat.T).double() + linear.bias.detach().float().double()
    torch.testing.assert_close(layer(x), expected, rtol=1e-7, atol=1e-7)
    exact = torch.nn.functional.linear(x_hat, w_hat, layer.bias)
    torch.testing.assert_close(layer(x), exact, rtol=1e-13, atol=1e-13)
    assert layer(x).dtype == torch.float64


def test_errors_that_are_compared_do_not_depend_on_the_last_digits(samples: Tensor) -> None:
    targets = [samples + 0.1]
    for seed in range(3):
        other = [jittered(samples, seed)]
        for normalize in (True, False):
            assert output_error(other, targets, normalize) == output_error(
                [samples], targets, normalize
            )
        assert mean_squared_error(other, targets) == mean_squared_error([samples], targets)

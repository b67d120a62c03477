"""What kernels have in common: obstacles in words, preferences, and one list that names them."""

import pytest
import torch

from qvlm.errors import UserError
from qvlm.packing import kernels
from qvlm.packing.kernels import KERNELS, kernel_named, names, preferred, serving
from qvlm.packing.kernels.reference import Reference
from qvlm.packing.layer import PackedLinear
from tests.helpers.layers import quantized


@pytest.fixture(scope="module")
def layers() -> list[PackedLinear]:
    """Layers of every kind of weight, with inputs that share scales and inputs that do not."""
    chosen = [
        quantized((48, 64), (4, 4)),
        quantized((5, 66), (8, 8), group_size=3),
        quantized((48, 64), (4, 4), "normal_float"),
        quantized((5, 66), (3, 5), "normal_float", group_size=4),
        quantized((16, 64), (4, 8), "per_channel", "per_channel_group", 16, ordered=False),
        quantized((16, 64), (6, 6), "per_tensor", "per_token"),
    ]
    return [PackedLinear.from_quantized(layer) for layer, _ in chosen]


def test_names_are_unique_and_auto_is_none_of_them() -> None:
    assert len({*names()}) == len(KERNELS) + 1
    assert names()[0] == "auto"
    assert [kernel_named(kernel.name) for kernel in KERNELS] == list(KERNELS)


def test_a_kernel_that_cannot_serve_says_why(layers: list[PackedLinear]) -> None:
    refused = set()
    for layer in layers:
        for kernel in KERNELS:
            obstacle = kernel.obstacle(layer)
            assert (obstacle is None) == (kernel in serving(layer))
            if obstacle is None:
                continue
            refused.add(kernel.name)
            with pytest.raises(UserError) as error:
                layer.kernel = kernel.name
            assert f"kernel={kernel.name!r} cannot serve some.layer: {obstacle}." in str(
                error.value
            )
            assert layer.kernel == "auto"
    assert refused >= {"native", "triton", "int4_weight_only", "int_mm"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows_give_no_rows(dtype: torch.dtype, layers: list[PackedLinear]) -> None:
    for layer in layers:
        for kernel in serving(layer):
            x = torch.zeros(0, layer.in_features, dtype=dtype)
            assert kernel.linear(layer, x, None).shape == (0, layer.out_features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 64])
def test_a_preferred_kernel_serves(
    rows: int, dtype: torch.dtype, layers: list[PackedLinear]
) -> None:
    for layer in layers:
        assert preferred(layer, rows, dtype) in serving(layer)
        assert layer(torch.zeros(rows, layer.in_features, dtype=dtype)).dtype == dtype


def test_more_rows_need_more_bytes(layers: list[PackedLinear]) -> None:
    for layer in layers:
        for kernel in serving(layer):
            one, many = (kernel.working_bytes(layer, rows) for rows in (1, 1000))
            assert 0 < one < many
            assert many >= 999 * 2 * layer.out_features


class Doubling(Reference):
    """A kernel that a test adds."""

    name = "doubling"

    def obstacle(self, layer: PackedLinear) -> str | None:
        return "it has no bias" if layer.bias is None else None

    def is_preferred(self, layer: PackedLinear, rows: int, dtype: torch.dtype) -> bool:
        return rows == 2

    def product(self, layer: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().product(layer, x)


def test_one_list_adds_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "KERNELS", (Doubling(), *KERNELS))
    layer, x = quantized((16, 64))
    packed = PackedLinear.from_quantized(layer)
    assert packed.choose(2) == "doubling"
    assert packed.choose(3) != "doubling"
    expected = 2 * layer(x[:3]) - layer.bias
    packed.kernel = "doubling"
    assert torch.allclose(packed(x[:3]), expected, atol=1e-5)
    assert packed.used == {"doubling": 1}
    without_bias, _ = quantized((16, 64), bias=False)
    with pytest.raises(UserError, match="cannot serve some.layer: it has no bias"):
        PackedLinear.from_quantized(without_bias, "doubling")

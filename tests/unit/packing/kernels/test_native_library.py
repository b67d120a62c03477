"""Products in C: exact sums for every shape of tile, and a reason where the library cannot run."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qvlm.packing.formats import pack
from qvlm.packing.kernels import native_library as native

needs_native = pytest.mark.skipif(
    native.obstacle() is not None, reason=f"native.c does not run: {native.obstacle()}"
)


@needs_native
@pytest.mark.parametrize("bits", [(4, 4), (6, 6), (8, 8), (4, 8), (3, 2)])
@pytest.mark.parametrize(
    ("rows", "out", "width", "group"),
    [
        (3, 70, 1100, 1100),
        (9, 5, 24, 8),
        (12, 130, 96, 32),
        (800, 65, 40, 16),
        (17, 64, 1030, 1030),
        (5, 70, 600, 128),
        (1, 3, 1290, 640),
        (2, 9, 203, 203),
    ],
)
@pytest.mark.parametrize("grid", ["token", "channel", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_exact(
    bits: tuple[int, int],
    rows: int,
    out: int,
    width: int,
    group: int,
    grid: str,
    dtype: torch.dtype,
) -> None:
    weight_bits, input_bits = bits
    generator = torch.Generator().manual_seed(0)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    codes = integers(2**weight_bits, out, width).to(torch.uint8)
    groups = -(-width // group)
    zero = integers(2**weight_bits, out, groups).to(torch.uint8)
    scale = 2.0 ** -integers(5, out, groups).float()  # float sums of powers of two are exact
    shape = {"token": (rows, 1), "channel": (width,), "tensor": ()}[grid]
    zero_point = integers(2**input_bits, *shape).float()
    input_scale = 2.0 ** -integers(5, *shape).float()
    position = integers(2**input_bits + 10, rows, width).float() - 5  # some lie beyond the grid
    order = torch.randperm(width, generator=generator) if grid == "channel" else None
    between = torch.rand(rows, width, generator=generator) - 0.5
    stored = ((position - zero_point + between) * input_scale).to(dtype)
    rounded = (stored.float() / input_scale).round() + zero_point
    steps = rounded.clamp(0, 2**input_bits - 1) - zero_point
    x = stored if order is None else torch.empty_like(stored).index_copy_(1, order, stored)
    weight = native.Weight(pack(codes, weight_bits), width, weight_bits, group)
    found = native.integer_product(
        weight.uniform(scale, zero),
        x,
        input_scale,
        zero_point,
        input_bits,
        None if order is None else order.int(),
    )
    v = codes.double() - zero.double().repeat_interleave(group, 1)[:, :width]
    v *= scale.double().repeat_interleave(group, 1)[:, :width]
    expected = steps.double() @ v.T
    # With four binary places, float32 holds sums up to 2^20, and float64 holds all of them.
    if dtype == torch.float32 or expected.abs().max() < 2**20:
        assert torch.equal(found.double(), expected)
    assert found.dtype == (torch.float64 if dtype == torch.float32 else torch.float32)
    magnitude = steps.double().abs() @ v.abs().T
    assert bool(((found - expected).abs() <= width * 2.0**-24 * magnitude).all())


@needs_native
def test_no_rows_give_no_rows() -> None:
    weight = native.Weight(torch.zeros(3, 4, dtype=torch.uint8), 8, 4, 8)
    weight.uniform(torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.uint8))
    one = torch.ones(())
    assert native.integer_product(weight, torch.zeros(0, 8), one, one, 4).shape == (0, 3)
    assert native.float_product(weight, torch.zeros(0, 8)).shape == (0, 3)


@needs_native
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("out", [1, 4, 7])
def test_pairs_of_codes_are_looked_up(rows: int, out: int) -> None:
    width, group, generator = 192, 64, torch.Generator().manual_seed(0)
    codes = torch.randint(16, (out, width), generator=generator).to(torch.uint8)
    x = torch.randint(-15, 16, (rows, width), generator=generator).float()
    zero = torch.randint(16, (out, 3), generator=generator).to(torch.uint8)
    scale = 2.0 ** -torch.randint(5, (out, 3), generator=generator).float()
    weight = native.Weight(pack(codes, 4), width, 4, group).uniform(scale, zero)
    assert weight.is_paired()
    v = (codes.view(out, 3, group).float() - zero[..., None]) * scale[..., None]
    assert torch.equal(native.rounded_product(weight, x), x @ v.flatten(1).T)
    levels = torch.randperm(16, generator=generator) / 8 - 1
    weight = native.Weight(pack(codes, 4), width, 4, group)
    weight.normal_float(levels, scale.flatten(), None, levels, 0, 1)
    w_hat = (levels[codes.long()].view(out, 3, group) * scale[..., None]).flatten(1)
    assert torch.equal(native.rounded_product(weight, x), x @ w_hat.T)
    found = native.dequantize(weight, slice(0, out), torch.bfloat16)
    assert torch.equal(found, w_hat.bfloat16())


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Empties all caches, on the disk as well, so that the library is not compiled yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caches = (native.obstacle, native._library)
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    for cache in caches:
        cache.cache_clear()


def test_obstacles_are_named(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("CC", "false")
    assert native.obstacle() == "the C compiler false fails: it gave no reason"
    native.obstacle.cache_clear()
    fresh.setenv("CC", "/no/such/compiler")
    assert "/no/such/compiler" in (native.obstacle() or "")
    native.obstacle.cache_clear()
    fresh.delenv("CC")
    fresh.setenv("PATH", "")
    assert native.obstacle() == "there is no C compiler"


@needs_native
def test_it_is_compiled_once(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert native.obstacle() is None
    (compiled,) = tmp_path.glob("qvlm/*")
    native.obstacle.cache_clear()
    native._library.cache_clear()
    fresh.setattr(native.subprocess, "run", None)  # no compiler may run again
    assert native.obstacle() is None
    assert list(tmp_path.glob("qvlm/*")) == [compiled]

"""`kernel=auto` takes the fastest of the kernels that give the same answers. No test waits: what
kernels take is planted."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from qvlm.packing.kernels import KERNELS, Kernel, chosen, kernel_named, measured
from qvlm.packing.kernels.int_mm import INT_MM
from qvlm.packing.kernels.reference import REFERENCE
from qvlm.packing.layer import PackedLinear
from qvlm.packing.model import kernel_choices
from tests.helpers.layers import quantized

pytestmark = [pytest.mark.instruction_set, pytest.mark.filterwarnings("error")]

Seconds = dict[str, float]


class Clock:
    """Plants what kernels take, and counts the measurements."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.measured = seconds, list[tuple[int, int, torch.dtype]]()

    def __call__(
        self, layer: PackedLinear, rivals: list[Kernel], rows: int, dtype: torch.dtype
    ) -> Seconds:
        self.measured.append((layer.in_features, rows, dtype))
        names = (measured.FLOAT, *(kernel.name for kernel in rivals))
        return {name: self.seconds.get(name, 1.0) for name in names}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of measurements, of which there are none yet."""
    file = tmp_path / "kernels.json"
    monkeypatch.setattr(measured, "_file", lambda: file)
    monkeypatch.setattr(measured, "_KNOWN", {})
    monkeypatch.setattr(measured, "_WARNED", set())
    return file


def restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets what only this process knows."""
    monkeypatch.setattr(measured, "_KNOWN", {})


def packed(width: int = 128) -> PackedLinear:
    return PackedLinear.from_quantized(quantized((128, width), group_size=64)[0])


def exact(layer: PackedLinear) -> list[str]:
    return [
        kernel.name
        for kernel in KERNELS
        if kernel.obstacle(layer) is None and kernel.is_exact(layer, torch.float32)
    ]


@pytest.mark.parametrize("fast", ["native", "int_mm"])
def test_the_fastest_exact_kernel_is_taken(
    fast: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = packed()
    if fast not in exact(layer):
        pytest.skip(f"{fast} does not run here")
    monkeypatch.setattr(measured, "_time", Clock(**{fast: 0.5}))
    layer(torch.ones(3, 128))
    assert layer.used == {fast: 1}
    (choice,) = kernel_choices(layer)
    assert choice["kernel"] == fast and choice["shape"] == [128, 128]
    assert choice["milliseconds"][fast] == 500 and choice["milliseconds"]["float"] == 1000
    assert choice["rows"] == [3, 3] and choice["dtype"] == "float32"


def test_what_gives_other_answers_is_never_taken(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However fast floating point is, and int_mm in a model in bf16, where it rounds elsewhere."""
    layer = packed()
    monkeypatch.setattr(measured, "_time", Clock(float=1.0, reference=1e-9, bf16=1e-9))
    assert chosen(layer, 5, torch.float32)[0].name in exact(layer)
    before = layer.choose(64, torch.bfloat16)
    monkeypatch.setattr(measured, "_time", Clock(int_mm=1e-9, reference=1e-9, bf16=1e-9))
    assert chosen(layer, 64, torch.bfloat16)[0].name == before


def test_a_number_of_rows_is_measured_once_per_shape_type_and_threads(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(measured, "_time", clock)
    for rows in (0, 1, 1, 2, 7, 8, 9, 64, 1000):
        for layer in (packed(), packed(256)):
            layer(torch.ones(rows, layer.in_features))
    expected = [(width, rows, torch.float32) for rows in (1, 8, 128) for width in (128, 256)]
    assert clock.measured == expected
    restart(monkeypatch)
    packed()(torch.ones(5, 128))
    assert clock.measured == expected  # the file keeps them
    packed()(torch.ones(5, 128).bfloat16())
    assert clock.measured == [*expected, (128, 8, torch.bfloat16)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    packed()(torch.ones(5, 128))
    assert len(clock.measured) == 8


def test_small_layers_are_not_measured(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(measured, "_time", clock)
    layer = PackedLinear.from_quantized(quantized((64, 128))[0])
    layer(torch.ones(1, 128))
    assert layer.used == {layer.choose(1): 1}
    assert not clock.measured and not place.exists() and not kernel_choices(layer)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"KEY": 3}',
        b'{"KEY": {"native": -1.0, "int_mm": -1.0, "float": 1.0}}',
        b'{"KEY": {"native": NaN, "int_mm": NaN, "float": 1.0}}',
        b'{"KEY": {"native": "fast", "int_mm": "fast", "float": 1.0}}',
        b'{"KEY": {"float": 1.0}}',
        b"[" * 100_000,
    ],
)
def test_what_is_not_intact_is_measured_anew(
    content: bytes, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(measured, "_time", clock)
    layer = packed()
    key = measured._key(layer, 8, torch.float32)
    place.write_bytes(content.replace(b"KEY", key.encode()))
    place.chmod(0o600)
    layer(torch.ones(5, 128))
    assert len(clock.measured) == 1
    assert json.loads(place.read_bytes())[key] == dict.fromkeys([*exact(layer), "float"], 1.0)


def test_a_file_that_others_could_write_is_not_believed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(measured, "_time", clock)
    packed()(torch.ones(5, 128))
    place.chmod(0o666)
    restart(monkeypatch)
    packed()(torch.ones(5, 128))
    assert len(clock.measured) == 2


def test_a_cache_that_cannot_be_written_only_warns(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "_time", Clock())
    monkeypatch.setattr(measured, "_file", lambda: place / "file" / "below.json")
    place.write_text("a file where a folder should be")
    layer = packed()
    with pytest.warns(UserWarning, match="Timings of kernels cannot be kept in"):
        layer(torch.ones(5, 128))
    assert sum(layer.used.values()) == 1


def test_a_slower_product_warns_once_with_the_factor(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "_time", Clock(float=0.25))
    packed()(torch.ones(5, 128))  # too small for a warning
    monkeypatch.setattr(measured, "WARNED", 128 * 128)
    with pytest.warns(UserWarning, match=r"some\.layer takes 1e\+03 ms instead of 250 ms") as seen:
        packed()(torch.ones(5, 128))
    assert len(seen) == 1 and "rows=8, 4.0 times as long" in str(seen[0].message)
    with warnings.catch_warnings(record=True) as none:
        packed(256)(torch.ones(5, 256))
    assert not none


def test_the_clock_measures_every_rival_and_floating_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one, on a fraction of the floating-point product."""
    monkeypatch.setattr(measured, "LARGEST", 64 * 128)
    layer = packed()
    seconds = measured._time(layer, [INT_MM, REFERENCE], 8, torch.float32)
    assert seconds.keys() == {"float", "int_mm", "reference"}
    assert all(0 < value < 10 for value in seconds.values())


def test_exact_kernels_give_the_same_answers() -> None:
    """So that a measurement changes no answer. One output in millions may round either way."""
    for inputs in ("per_tensor", "per_token", "per_channel_group"):
        for bits in ((4, 4), (8, 8)):
            layer, x = quantized((128, 256), bits, inputs=inputs, group_size=64)
            made = PackedLinear.from_quantized(layer)
            first, *others = (kernel_named(name).product(made, x) for name in exact(made))
            for other in others:
                tolerance = 1e-13 * float(first.abs().max())
                assert torch.allclose(first, other, rtol=1e-13, atol=tolerance)
                assert (first.float() != other.float()).sum() <= 1

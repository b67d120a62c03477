"""Every product of a packed layer is exact where it claims so; the obstacles of the C products.

Nothing here needs an instruction set: what the C products must give, the stock products must give
too, and a test checks all that serve on the machine it runs on.
"""

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qvlm.errors import UserError
from qvlm.packing.form import Form
from qvlm.packing.formats import pack
from qvlm.packing.kernels import kernel_named, native_build, reference
from qvlm.packing.kernels import native as native_kernel
from qvlm.packing.kernels import native_library as native
from qvlm.packing.layer import PackedLinear
from tests.helpers.layers import quantized

pytestmark = [pytest.mark.instruction_set, pytest.mark.slow]


def packed_layer(form: Form, codes: Tensor, **numbers: Tensor) -> PackedLinear:
    """A packed layer of codes [out, in] uint8 and the other buffers that its form names.

    Float32 numbers are stored as their bits; a NormalFloat mean is zero.
    """
    packed = PackedLinear(form)
    numbers["codes"] = pack(codes, form.weight_bits)
    if form.weight == "normal_float":
        numbers["mean"] = torch.zeros(1)
    for name, value in numbers.items():
        bits = value.view(torch.int32) if value.dtype == torch.float32 else value
        assert getattr(packed, name).shape == bits.shape, name
        setattr(packed, name, bits)
    return packed


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
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sums of t v s by `native` and `int_mm`; a folded scale of channels is no factor."""
    weight_bits, input_bits = bits
    generator = torch.Generator().manual_seed(0)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    codes = integers(2**weight_bits, out, width).to(torch.uint8)
    groups = -(-width // group)
    zero = integers(2**weight_bits, out, groups).to(torch.uint8)
    scale = 2.0 ** -integers(5, out, groups).float()  # powers of two, so that float sums are exact
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

    form = Form(
        in_features=width,
        out_features=out,
        bias=False,
        weight="uniform",
        weight_bits=weight_bits,
        group_size=group,
        scale_shape=(out, groups),
        inputs="token" if grid == "token" else "static",
        input_bits=input_bits,
        input_shape=shape if grid == "channel" else (),
        folds=grid == "channel",
        ordered=order is not None,
    )
    numbers = {"scale": scale, "zero_point": zero}
    if order is not None:
        numbers["order"] = order.int()
    packed = packed_layer(form, codes, **numbers)
    # Any grid of the input, not only one that a range of its values gives.
    monkeypatch.setattr(packed, "input_grid", lambda x: (input_scale, zero_point))

    monkeypatch.setattr(native, "token_grids", lambda x, ratio, bits: (input_scale, zero_point))

    v = codes.double() - zero.double().repeat_interleave(group, 1)[:, :width]
    v *= scale.double().repeat_interleave(group, 1)[:, :width]
    factor = torch.ones(()) if grid == "channel" else input_scale
    expected = (steps.double() @ v.T) * factor
    magnitude = (steps.double().abs() @ v.abs().T) * factor
    serving = [kernel for kernel in ("native", "int_mm") if kernel in packed.serving()]
    assert "int_mm" in serving and ("native" in serving) == (native.obstacle() is None)
    for kernel in serving:
        found = kernel_named(kernel).product(packed, x)
        # With four bits behind the point, float32 holds sums up to 2^20, and float64 all.
        if dtype == torch.float32 or (expected / factor).abs().max() < 2**20:
            assert torch.equal(found.double(), expected), kernel
        assert found.dtype == (torch.float64 if dtype == torch.float32 else torch.float32)
        error = (found - expected).abs()
        assert bool((error <= width * 2.0**-24 * magnitude).all()), kernel


def four_bits(weight: str, out: int, width: int, group: int, input_shape: tuple[int, ...]) -> Form:
    """The form of a layer of 4-bit weights and 8-bit static inputs."""
    groups = width // group
    return Form(
        in_features=width,
        out_features=out,
        bias=False,
        weight=weight,
        weight_bits=4,
        group_size=group,
        scale_shape=(out, groups) if weight == "uniform" else (),
        constants=() if weight == "uniform" else (0, out * groups),
        inputs="static",
        input_bits=8,
        input_shape=input_shape,
    )


@pytest.mark.parametrize("weight", ["uniform", "normal_float"])
def test_no_rows_give_no_rows(weight: str) -> None:
    numbers = {"scale": torch.ones(3), "input_scale": torch.ones(())}
    if weight == "uniform":
        numbers |= {"scale": torch.ones(3, 1), "zero_point": torch.zeros(3, 1, dtype=torch.uint8)}
    numbers["input_zero_point"] = torch.tensor(128, dtype=torch.uint8)
    codes = torch.zeros(3, 8, dtype=torch.uint8)
    packed = packed_layer(four_bits(weight, 3, 8, 8, ()), codes, **numbers)
    for kernel in packed.serving():
        packed.kernel = kernel
        assert packed(torch.zeros(0, 8)).shape == (0, 3), kernel


@pytest.mark.parametrize("weight", ["uniform", "normal_float"])
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("out", [1, 4, 7])
def test_sums_of_bf16_are_exact(
    weight: str, rows: int, out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where bf16 holds both operands, `native` gives their exact sums and `bf16` rounds these."""
    width, group, generator = 192, 64, torch.Generator().manual_seed(0)
    codes = torch.randint(16, (out, width), generator=generator).to(torch.uint8)
    x = torch.randint(-15, 16, (rows, width), generator=generator).float()
    zero = torch.randint(16, (out, 3), generator=generator).to(torch.uint8)
    scale = 2.0 ** -torch.randint(5, (out, 3), generator=generator).float()
    # Channels of a group differ in scale, so that the weight is made float.
    numbers = {
        "scale": scale,
        "zero_point": zero,
        "input_scale": 2.0 ** -(torch.arange(width) % 2).float(),
        "input_zero_point": torch.full((width,), 128, dtype=torch.uint8),
    }
    values = codes.view(out, 3, group).float() - zero[..., None]
    if weight == "normal_float":
        levels = torch.randperm(16, generator=generator) / 8 - 1
        for module in (reference, native_kernel):
            monkeypatch.setattr(module, "kept_levels", lambda bits: levels)
        values = levels[codes.long()].view(out, 3, group)
        numbers["scale"] = scale.flatten()
        del numbers["zero_point"]
    w_hat = (values * scale[..., None]).flatten(1)
    expected = x @ w_hat.T

    packed = packed_layer(four_bits(weight, out, width, group, (width,)), codes, **numbers)
    assert not packed.has_integer_product()
    assert torch.equal(
        reference.float_weight(packed, slice(0, out), torch.bfloat16), w_hat.bfloat16()
    )
    x = x.bfloat16()
    assert torch.equal(kernel_named("reference").product(packed, x), expected)
    assert torch.allclose(kernel_named("bf16").product(packed, x), expected, rtol=2.0**-8, atol=0)
    if "native" in packed.serving():
        assert native_kernel._weight(packed).is_paired()
        assert torch.equal(kernel_named("native").product(packed, x), expected)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Nothing is compiled, asked or switched off yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(native_build.WITHOUT, raising=False)
    caches = (
        native.obstacle,
        native.instruction_set,
        native._library,
        native.library_of,
        native_build.library,
    )
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    for cache in caches:
        cache.cache_clear()


def test_what_is_in_the_way_is_said(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("CC", "false")
    assert native.obstacle() == "the C compiler false fails: it gave no reason"
    native.obstacle.cache_clear()
    fresh.setenv("CC", "/no/such/compiler")
    assert "/no/such/compiler" in (native.obstacle() or "")
    native.obstacle.cache_clear()
    fresh.setenv("CC", 'gcc "')
    assert native.obstacle() == "CC='gcc \"' is no command: No closing quotation"
    native.obstacle.cache_clear()
    fresh.delenv("CC")
    fresh.setenv("PATH", "")
    assert native.obstacle() == "there is no C compiler"


def test_developers_can_do_without(fresh: pytest.MonkeyPatch) -> None:
    layer, x = quantized((5, 64))
    fresh.setenv(native_build.WITHOUT, "native")
    assert native.obstacle() == "QVLM_WITHOUT=native is set"
    packed = PackedLinear.from_quantized(layer)
    packed(x)
    assert "native" not in packed.serving() and "native" not in packed.used
    with pytest.raises(UserError, match=r"some\.layer: QVLM_WITHOUT=native is set"):
        packed.kernel = "native"
    native.obstacle.cache_clear()
    fresh.setenv(native_build.WITHOUT, "int_mm")
    with pytest.raises(UserError, match="QVLM_WITHOUT='int_mm' is not .*: native, avx512"):
        native.obstacle()


@pytest.fixture
def compiler(fresh: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A compiler that writes a text file; the file beside it counts its calls."""
    compiler = tmp_path / "compiler"
    # The last two arguments are `-o FILE`.
    compiler.write_text(
        f'#!/bin/sh\necho >> {compiler}.calls\nfor at; do :; done\necho x > "$at"\n'
    )
    compiler.chmod(0o755)
    fresh.setenv("CC", str(compiler))
    return compiler


def test_the_command_of_the_compiler_may_have_arguments(
    fresh: pytest.MonkeyPatch, compiler: Path, tmp_path: Path
) -> None:
    fresh.setenv("CC", f"env {compiler}")
    assert native_build.compiled(tmp_path, "native.c", []).read_text() == "x\n"
    assert count(compiler) == 1


def count(compiler: Path) -> int:
    """The number of times that a library was made: it is compiled and linked."""
    return len(Path(f"{compiler}.calls").read_text().splitlines()) // 2


def cached() -> Path:
    folder = native_build.cache_folder()
    assert folder is not None
    return native_build.compiled(folder, "native_cpu.c", [])


def test_it_is_compiled_once_for_the_user_alone(compiler: Path, tmp_path: Path) -> None:
    compiled = cached()
    assert cached() == compiled
    assert list(tmp_path.glob("qvlm/*")) == [compiled]
    assert count(compiler) == 1
    assert stat.S_IMODE(compiled.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(compiled.stat().st_mode) == 0o600


def test_a_library_is_for_the_user_alone_from_its_first_moment(
    compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may look at once, and deletes what others could have written."""
    before = os.umask(0o002)
    found: list[bool] = []
    rename = Path.replace

    def seen(written: Path, target: Path) -> Path:
        rename(written, target)
        found.append(native_build.is_intact(target))
        return target

    monkeypatch.setattr(Path, "replace", seen)
    try:
        cached()
    finally:
        os.umask(before)
    assert found == [True]


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_full_cache_folder_is_done_without(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write = native_build.write_private

    def full(file: Path, content: bytes) -> None:
        if file.is_relative_to(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, content)

    fresh.setattr(native_build, "write_private", full)
    native_build.supported()  # compiles a file and loads it


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def plant(file: Path) -> None:
    file.write_bytes(b"another library")


def link(file: Path) -> None:
    content = file.with_name("elsewhere")
    file.rename(content)
    file.symlink_to(content)


def open_to_all(file: Path) -> None:
    file.chmod(0o666)


def open_to_the_group(file: Path) -> None:
    file.chmod(0o620)


def give_away(file: Path) -> None:
    os.chown(file, 65534, -1)


FAULTS = [truncate, empty, plant, link, open_to_all, open_to_the_group]


@pytest.mark.parametrize("fault", [*FAULTS, *([give_away] if os.geteuid() == 0 else [])])
def test_what_is_not_intact_is_made_anew_and_not_loaded(
    fault: Callable[[Path], None], compiler: Path
) -> None:
    compiled = cached()
    content = compiled.read_bytes()
    fault(compiled)
    assert cached() == compiled
    assert count(compiler) == 2
    assert native_build.is_intact(compiled) and compiled.read_bytes() == content


def test_a_planted_library_of_another_name_is_not_loaded(compiler: Path) -> None:
    compiled = cached()
    planted = compiled.with_name(compiled.name.replace(compiled.stem[-32:], "0" * 32))
    planted.write_bytes(b"planted")  # it comes first in the order of names
    assert cached() == compiled
    assert not planted.exists()


def test_a_folder_that_others_could_write_is_closed(compiler: Path, tmp_path: Path) -> None:
    (tmp_path / "qvlm").mkdir()
    (tmp_path / "qvlm").chmod(0o777)
    assert stat.S_IMODE(cached().parent.stat().st_mode) == 0o700


def link_to_a_folder(folder: Path) -> None:
    folder.with_name("theirs").mkdir(mode=0o700)
    folder.symlink_to(folder.with_name("theirs"))


def be_a_file(folder: Path) -> None:
    folder.write_text("")


def dangle(folder: Path) -> None:
    folder.symlink_to("nowhere")


def belong_to_another(folder: Path) -> None:
    folder.mkdir()
    os.chown(folder, 65534, -1)


PLACES = [link_to_a_folder, be_a_file, dangle]


@pytest.mark.parametrize("place", [*PLACES, *([belong_to_another] if os.geteuid() == 0 else [])])
def test_a_folder_that_cannot_be_trusted_is_not_used(
    place: Callable[[Path], None], compiler: Path, tmp_path: Path
) -> None:
    place(tmp_path / "qvlm")
    assert native_build.cache_folder() is None
    assert "file too short" in (native.obstacle() or "")  # the compiler's text is no library
    assert count(compiler) == 1
    assert not list(tmp_path.glob("theirs/*"))


@pytest.mark.parametrize("home", ["", "relative", "/proc/nowhere"])
def test_no_home_is_no_traceback(home: str, fresh: pytest.MonkeyPatch, compiler: Path) -> None:
    fresh.delenv("XDG_CACHE_HOME")
    fresh.setenv("HOME", home)
    assert native_build.cache_folder() is None
    assert native.obstacle() is not None
    assert count(compiler) == 1


def test_a_library_without_the_products_is_an_obstacle(
    fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It loads, knows of a CPU with everything, and has none of the functions."""
    real = shutil.which("cc") or shutil.which("gcc")
    if real is None:
        pytest.skip("needs a C compiler")
    compiler = tmp_path / "compiler"
    code = "int supports(void) { return 1; }"
    compiler.write_text(
        f'#!/bin/sh\nfor at; do :; done\necho "{code}" | {real} -shared -fPIC -xc - -o "$at"\n'
    )
    compiler.chmod(0o755)
    fresh.setenv("CC", str(compiler))
    assert native.obstacle() == "the compiled library has no integer_rows"


def test_a_narrower_machine_can_be_played(fresh: pytest.MonkeyPatch) -> None:
    monkeypatch = fresh
    monkeypatch.setattr(native_build, "supported", lambda: ["avx512", "avx2"])
    assert native.instruction_set() == "avx512"
    native.instruction_set.cache_clear()
    monkeypatch.setenv(native_build.WITHOUT, "avx512,avxvnni")
    assert native.instruction_set() == "avx2"
    native.instruction_set.cache_clear()
    monkeypatch.setenv(native_build.WITHOUT, "avx512,avx2")
    assert "none of the instruction sets avx512, " in (native.obstacle() or "")
    assert "but those of QVLM_WITHOUT=avx512,avx2" in (native.obstacle() or "")


def test_a_changed_header_is_another_library(
    compiler: Path, tmp_path: Path, fresh: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "sources"
    shutil.copytree(native_build.FOLDER, sources)
    fresh.setattr(native_build, "FOLDER", sources)
    before = cached()
    with (sources / "native_types.h").open("a") as file:
        file.write("/* changed */")
    assert cached().stem.split("-")[1] != before.stem.split("-")[1]
    assert count(compiler) == 2

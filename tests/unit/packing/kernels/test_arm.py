"""The products for ARM, compiled for it and run in an emulator, give the bits of every machine.

They need a cross compiler and qemu, for example Debian's gcc-aarch64-linux-gnu and
qemu-user-static. On an ARM machine `test_instruction_sets.py` runs them without.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qvlm.packing.formats import pack
from qvlm.packing.kernels import native_build
from qvlm.packing.kernels import native_library as native
from tests.helpers.native_cases import BITS, IntegerCase, integer_cases

COMPILER = shutil.which("aarch64-linux-gnu-gcc")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
DRIVER = Path(__file__).parents[3] / "helpers" / "native_driver.c"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        COMPILER is None or EMULATOR is None or native.obstacle() is not None,
        reason="needs aarch64-linux-gnu-gcc, qemu-aarch64, and C products on this machine",
    ),
]


@pytest.mark.parametrize(("instruction_set", "cpu"), [("dotprod", "neoverse-n1"), ("i8mm", "max")])
def test_arm_gives_the_bits_of_every_machine(
    instruction_set: str, cpu: str, tmp_path: Path
) -> None:
    assert COMPILER is not None and EMULATOR is not None
    program = tmp_path / "program"
    flags = [*native_build.FLAGS, *native_build.INSTRUCTION_SETS[instruction_set]]
    # -O1 compiles in a third of the time, and what matters here is the same.
    command = [COMPILER, *flags, "-O1", "-static", f"-I{native_build.FOLDER}", str(DRIVER)]
    subprocess.run([*command, "-o", str(program)], check=True)
    cases = list(arm_cases())[::5]  # of all bit widths, shapes, grids and types
    (tmp_path / "in").write_bytes(b"".join(map(described, cases)))
    files = (str(tmp_path / "in"), str(tmp_path / "out"))
    subprocess.run([EMULATOR, "-cpu", cpu, str(program), *files], check=True)
    found = (tmp_path / "out").read_bytes()
    for case, levels in cases:
        for name, expected in expected_of(case, levels):
            size = expected.nbytes
            same = found[:size] == expected.contiguous().view(torch.uint8).numpy().tobytes()
            assert same, (name, case.bits, case.x.dtype, case.codes.shape, case.group)
            found = found[size:]
    assert not found


def arm_cases() -> Iterator[tuple[IntegerCase, Tensor | None]]:
    """Yields integer cases, and some of them again as NormalFloat with levels for their codes."""
    for bits in BITS:
        for case in integer_cases(bits):
            yield case, None
            if case.codes.shape[1] % case.group == 0:
                yield case, torch.linspace(-1, 1, 2 ** bits[0]) ** 3


def described(pair: tuple[IntegerCase, Tensor | None]) -> bytes:
    """Returns a case as native_driver.c reads it."""
    case, levels = pair
    codes, half = pack(case.codes, case.bits[0]), case.x.dtype == torch.bfloat16
    (out, width), groups = case.codes.shape, case.zero.shape[1]
    by_row, by_channel = case.scale.ndim == 2, case.scale.ndim == 1
    fields = [case.bits[0], out, width, codes.shape[1], case.group, groups]
    fields += [levels is not None, len(case.x), half, by_row, by_channel, case.bits[1]]
    values = torch.zeros(2 ** case.bits[0]) if levels is None else levels
    arrays = (codes, case.weight_scale, case.zero, values, case.x, case.scale, case.zero_point)
    return np.array(fields, np.int64).tobytes() + b"".join(
        array.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for array in arrays
    )


def expected_of(case: IntegerCase, levels: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """Yields the outputs that native_driver.c writes. Float sums are those of this machine."""
    weight = case.weight()
    if levels is None:
        yield "integer_rows", case.expected()
        yield "integer_tiles", case.expected()
    else:
        weight = native.Weight(weight._held[0], weight.width, case.bits[0], case.group)
        weight.normal_float(levels, case.weight_scale, None, torch.zeros(256), 0.0, 1)
    if case.x.dtype == torch.float32:
        yield "float_rows", native.float_product(weight, case.x)
    elif weight.is_paired():
        yield "rounded_rows", native.rounded_product(weight, case.x)
    positions = case.x.numel() // 16
    if positions >= 3:
        keys = case.x.flatten()[: 16 * positions].view(1, 1, positions, 16)
        yield "attend", native.attend(keys[:, 0, :3], keys, keys, None, 0.01)
    yield "dequantize", native.dequantize(weight, slice(0, weight.out), case.x.dtype)

"""Products with packed weights in C (`native.c`), for CPUs with AVX-512: VNNI, VBMI and BF16.

The weight is read as checkpoints hold it, and unpacked in registers. In the notation of
`kernels.py`:

`integer_product` puts inputs on their grid, and sums t v exactly in int32 over each run of channels
that share a weight scale and that of the input. Few rows read the weight once (`integer_rows`);
many repay unpacking it into tiles (`integer_tiles`). What is added over runs is float32 in a model
in bf16, and float64 in others: their output is then rounded once, to what `compute_in_float64` of a
simulated layer gives.

`float_product` multiplies float inputs with the float weight of the simulation, made in registers:
few rows of inputs whose channels differ in scale, and NormalFloat. `rounded_product` does so in
bf16, for models in that type and codes of up to `LOOKED_UP` bits, which is several times faster.

`dequantize` makes that weight, for whoever wants to multiply it otherwise.

The file is compiled with the machine's C compiler when it is first asked for, which takes seconds,
and kept in the user's cache folder. Without a compiler, or on another CPU, `obstacle` says so and
stock operators serve. Left out: NormalFloat in blocks that cross rows.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from qvlm.errors import RunError
from qvlm.records.files import write_file

SOURCE = Path(__file__).with_name("native.c")
FLAGS = [
    *("-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", "-mfma"),
    *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni", "vbmi", "bf16")),
]
# Rows up to which the weight is read once per ROWS of native.c, and not unpacked into tiles.
FEW_ROWS = 8
CHUNK = 64  # of native.c
LOOKED_UP = 4

_pointer = ctypes.c_void_p
_number = ctypes.c_int64


class _Weight(ctypes.Structure):
    """`Weight` of native.c."""

    _fields_ = (
        ("codes", _pointer),
        *((name, _number) for name in ("rows", "width", "row_bytes", "bits", "group")),
        ("scale", _pointer),
        ("zero", _pointer),
        ("stride", _number),
        ("factor", _pointer),
        *(
            (name, _pointer)
            for name in ("levels", "constant_codes", "constant_levels", "constants")
        ),
        ("mean", ctypes.c_float),
        ("constant_block", _number),
    )


class Weight:
    """A packed weight as `native.c` reads it: no copy, so it holds on to its tensors.

    Args:
        codes: [out, bytes] uint8 as `formats` says.
        width: channels.
        bits: of a code.
        group: neighbouring channels that share a scale; divides `width` for NormalFloat.
    """

    def __init__(self, codes: Tensor, width: int, bits: int, group: int) -> None:
        self._held = [codes]
        self.width, self.out = width, codes.shape[0]
        self.at = _Weight(
            codes=codes.data_ptr(),
            rows=self.out,
            width=width,
            row_bytes=codes.shape[1],
            bits=bits,
            group=group,
        )

    def uniform(self, scale: Tensor, zero_point: Tensor, factor: Tensor | None = None) -> "Weight":
        """With scales [out or 1, groups] float32 and zero points of that shape, uint8.

        Integer products multiply the sum of a group by its `factor` [groups] float32 too.
        """
        self.at.scale, self.at.zero = self._hold(scale), self._hold(zero_point)
        self.at.stride = scale.shape[1] if scale.shape[0] > 1 else 0
        if factor is not None:
            self.at.factor = self._hold(factor)
        return self

    def normal_float(
        self,
        levels: Tensor,
        constants: Tensor,
        constant_codes: Tensor | None,
        constant_levels: Tensor,
        mean: float,
        constant_block: int,
    ) -> "Weight":
        """With levels [2^bits] and the fields of `formats.Constants`."""
        self.at.levels, self.at.constants = self._hold(levels), self._hold(constants)
        if constant_codes is not None:
            self.at.constant_codes = self._hold(constant_codes)
            self.at.constant_levels = self._hold(constant_levels)
        self.at.mean, self.at.constant_block = mean, constant_block
        return self

    def is_paired(self) -> bool:
        """Whether a byte holds two codes, and a group whole chunks."""
        return self.at.bits == 4 and self.at.group % CHUNK == 0 and self.width % CHUNK == 0

    def _hold(self, x: Tensor) -> int:
        self._held.append(x)
        return x.data_ptr()


def takes(width: int, bits: int, group: int) -> bool:
    """Whether every group of channels begins at the start of a byte."""
    return group >= width or group * bits % 8 == 0


class _Input(ctypes.Structure):
    """`Input` of native.c."""

    _fields_ = (
        ("x", _pointer),
        *((name, _number) for name in ("rows", "width", "half")),
        *((name, _pointer) for name in ("order", "scale", "zero")),
        *((name, _number) for name in ("by_row", "by_channel", "bits")),
    )


def integer_product(
    weight: Weight,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    input_bits: int,
    order: Tensor | None = None,
) -> Tensor:
    """The sums of t v s, [rows, out], where t = q - z of inputs of up to 8 bits.

    In float32 for inputs in bf16, in float64 for others. Inputs are put on their grid here, as
    `UniformQuantizer` does it, to the bit.

    Args:
        weight: uniform.
        x: finite, [rows, in].
        scale, zero_point: of the input, float32, both of one shape: one number, [rows, 1], or [in]
            in the order of the weight's channels.
        order: which channel of `x` each channel of the weight is, [in] int32.
    """
    rows, width = x.shape
    half = x.dtype == torch.bfloat16
    y = torch.empty(rows, weight.out, dtype=torch.float32 if half else torch.float64)
    if not rows:
        return y
    x = (x if half else x.float()).contiguous()
    scale, zero_point = scale.contiguous(), zero_point.contiguous()
    by_row = scale.ndim == 2 and scale.shape == (rows, 1)
    inputs = _Input(
        x=_of(x),
        rows=rows,
        width=width,
        half=half,
        order=_of(order),
        scale=_of(scale),
        zero=_of(zero_point),
        by_row=by_row,
        by_channel=not by_row and scale.numel() > 1,
        bits=input_bits,
    )
    product = _library().integer_rows if rows <= FEW_ROWS else _library().integer_tiles
    if product(_at(weight), ctypes.addressof(inputs), _of(y)):
        raise RunError("no memory is left for a packed product")
    return y


def float_product(weight: Weight, x: Tensor) -> Tensor:
    """x [rows, in] float32 times the float weight, transposed: [rows, out] float32."""
    x, y = x.float().contiguous(), torch.empty(len(x), weight.out)
    _library().float_rows(_at(weight), len(x), _of(x), _of(y))
    return y


def rounded_product(weight: Weight, x: Tensor) -> Tensor:
    """x [rows, in] rounded to bf16 times the weight, transposed: [rows, out] float32.

    NormalFloat levels are rounded to bf16, scales are not. Codes have at most `LOOKED_UP` bits.
    """
    x, y = x.to(torch.bfloat16).contiguous(), torch.empty(len(x), weight.out)
    product = _library().rounded_rows
    if weight.is_paired():
        x = x.view(len(x), -1, CHUNK // 2, 2).transpose(2, 3).contiguous()
        product = _library().paired_rows
    product(_at(weight), len(x), _of(x), _of(y))
    return y


def dequantize(weight: Weight, rows: slice, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of the float weight of the simulation, in float32 to the bit; or rounded to bf16."""
    y = torch.empty(rows.stop - rows.start, weight.width, dtype=dtype)
    half = dtype == torch.bfloat16
    _library().dequantize(_at(weight), rows.start, rows.stop, half, _of(y))
    return y


@cache
def obstacle() -> str | None:
    """Why `native.c` cannot run here, or None."""
    try:
        library = _library()
    except (OSError, subprocess.SubprocessError) as error:
        return " ".join(str(error).split())
    return None if library.supported() else "the CPU has no AVX-512 with VNNI, VBMI and BF16"


@cache
def _library() -> ctypes.CDLL:
    """The compiled file.

    It is not linked to an OpenMP library: its threads are to be those of the one that PyTorch has
    loaded for all to see, so that `torch.set_num_threads` holds and no second pool competes.

    Raises:
        OSError: if there is no compiler, it fails, or what it made does not load.
    """
    library = ctypes.CDLL(str(_compiled()))
    arguments = {
        "integer_rows": [_pointer] * 3,
        "integer_tiles": [_pointer] * 3,
        "float_rows": [_pointer, _number, *[_pointer] * 2],
        "rounded_rows": [_pointer, _number, *[_pointer] * 2],
        "paired_rows": [_pointer, _number, *[_pointer] * 2],
        "dequantize": [_pointer, *[_number] * 3, _pointer],
    }
    for name, types in arguments.items():
        function = getattr(library, name)
        function.argtypes = types
        function.restype = ctypes.c_int if name.startswith("integer") else None
    return library


def _compiled() -> Path:
    """Where the library is; compiles it if this source never was."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise OSError("there is no C compiler")
    identity = hashlib.sha256(SOURCE.read_bytes() + " ".join([compiler, *FLAGS]).encode())
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = caches / "qvlm" / f"native-{identity.hexdigest()[:16]}.so"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made, library = Path(folder, "native.o"), Path(folder, "native.so")
        for command in (
            [compiler, *FLAGS, "-c", str(SOURCE), "-o", str(made)],
            [compiler, "-shared", str(made), "-o", str(library)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                message = (done.stderr.strip().splitlines() or ["it gave no reason"])[0]
                raise OSError(f"the C compiler {compiler} fails: {message}")
        write_file(target, library.read_bytes())
    return target


def _at(weight: Weight) -> int:
    return ctypes.addressof(weight.at)


def _of(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()

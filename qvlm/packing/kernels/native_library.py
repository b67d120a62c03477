"""The C library of the kernel `native`: compiles `native.c`, and calls its products on tensors.

The library needs a CPU with AVX-512 VNNI, VBMI and BF16. It reads the weight as checkpoints hold it
and unpacks codes in registers. In the notation of `base.py`:

- `integer_product` quantizes the input, and sums t v exactly in int32 over each run of channels
  that share all scales. For few rows it reads the weight as it is stored (`integer_rows` of
  native.c); for many rows it unpacks the weight into tiles (`integer_tiles`). Sums of runs are
  added in float32 for an input in bf16, and in float64 for any other. The output in float64 is then
  rounded once, to what `compute_in_float64` of a simulated layer gives.
- `float_product` multiplies a float input with the dequantized weight, which it makes in registers.
  It serves few rows of inputs whose channels differ in scale, and NormalFloat.
- `rounded_product` does the same in bf16, for models in bf16 and codes of up to `LOOKED_UP` bits,
  and is several times faster.
- `dequantize` writes the dequantized weight to memory, for products by other means.

The machine's C compiler compiles the file when it is first needed, which takes seconds, and the
library is kept in a cache folder that only the user may write. Its name holds the hash of its
content, and it is loaded only if it is the user's own file with that content, because loading runs
it. Without such a folder it is compiled anew by each process. Without a compiler, or on another
CPU, `obstacle` gives the reason, and other kernels serve. Left out: NormalFloat in blocks that
cross rows.

The environment variable `QVLM_WITHOUT=native` makes `obstacle` refuse on every machine, so that a
developer can run, on a CPU that has these instructions, what a CPU without them runs.
`make test-narrow` sets it. It must be set before the first packed layer is made.
"""

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from qvlm.errors import RunError, UserError
from qvlm.records.files import write_file

SOURCE = Path(__file__).with_name("native.c")
FLAGS = [
    *("-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", "-mfma"),
    *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni", "vbmi", "bf16")),
]
# Rows up to which the weight is read once per ROWS rows (see native.c) and not unpacked into tiles.
FEW_ROWS = 8
# Codes that native.c unpacks at once.
CHUNK = 64
# Largest bit width of codes whose values are looked up.
LOOKED_UP = 4
WITHOUT = "QVLM_WITHOUT"

_pointer = ctypes.c_void_p
_number = ctypes.c_int64


class _Weight(ctypes.Structure):
    """`Weight` of native.c: the same fields in the same order."""

    _fields_ = (
        ("codes", _pointer),
        *((name, _number) for name in ("rows", "width", "row_bytes", "bits", "group")),
        ("scale", _pointer),
        ("zero", _pointer),
        ("stride", _number),
        ("factor", _pointer),
        *(
            (name, _pointer)
            for name in ("levels", "absmax_codes", "absmax_levels", "nested_absmax")
        ),
        ("mean", ctypes.c_float),
        ("nested_block", _number),
    )


class Weight:
    """A packed weight as `native.c` reads it.

    The library reads the memory of the tensors, so this object keeps references to them. One of
    `uniform` and `normal_float` adds the scales.

    Args:
        codes: Packed codes, [out, bytes] uint8, as `formats` describes them.
        width: Number of input channels.
        bits: Bit width of the codes.
        group: Number of neighboring channels that share a scale. It divides `width` for
            NormalFloat.
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
        """Makes the weight uniform.

        Args:
            scale: Scales, [out or 1, groups] float32 or their bits.
            zero_point: Zero points of the same shape, uint8.
            factor: Input scale of each group, [groups] float32, which integer products multiply the
                sum of the group with; None for ones.
        """
        self.at.scale, self.at.zero = self._hold(scale), self._hold(zero_point)
        self.at.stride = scale.shape[1] if scale.shape[0] > 1 else 0
        if factor is not None:
            self.at.factor = self._hold(factor)
        return self

    def normal_float(
        self,
        levels: Tensor,
        nested: Tensor,
        absmax_codes: Tensor | None,
        absmax_levels: Tensor,
        mean: float,
        nested_block: int,
    ) -> "Weight":
        """Makes the weight NormalFloat.

        Args:
            levels: Values of the codes, [2^bits] float32.
            absmax_levels: Values of the absmax codes, [256] float32.
            nested, absmax_codes, mean, nested_block: Fields of `absmax.PackedAbsmax`.
        """
        self.at.levels, self.at.nested_absmax = self._hold(levels), self._hold(nested)
        if absmax_codes is not None:
            self.at.absmax_codes = self._hold(absmax_codes)
            self.at.absmax_levels = self._hold(absmax_levels)
        self.at.mean, self.at.nested_block = mean, nested_block
        return self

    def is_paired(self) -> bool:
        """Whether each byte holds two codes and each group consists of whole chunks."""
        return self.at.bits == 4 and self.at.group % CHUNK == 0 and self.width % CHUNK == 0

    def _hold(self, x: Tensor) -> int:
        self._held.append(x)
        return x.data_ptr()


def takes(width: int, bits: int, group: int) -> bool:
    """Whether every group of channels begins at a byte of its own.

    Args:
        width: Number of channels.
        bits: Bit width of the codes.
        group: Number of channels in a group.
    """
    return group >= width or group * bits % 8 == 0


class _Input(ctypes.Structure):
    """`Input` of native.c: the same fields in the same order."""

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
    """Quantizes an input and sums t v s over its channels.

    The input is quantized as `UniformQuantizer` does it, to the bit.

    Args:
        weight: Uniform weight.
        x: Finite input, [rows, in].
        scale, zero_point: Grid of the input, float32, both of one shape: one number, [rows, 1], or
            [in] in the order of the weight's channels.
        input_bits: Bit width of the input's codes, 2 to 8.
        order: Channel of `x` that each channel of the weight is, [in] int32; None if they are the
            same.

    Returns:
        Sums of t v s, [rows, out]: float32 for an input in bf16, float64 for any other.

    Raises:
        RunError: If there is not enough memory.
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
        raise RunError("There is not enough memory for a packed product.")
    return y


def float_product(weight: Weight, x: Tensor) -> Tensor:
    """Multiplies an input with the dequantized weight, transposed, in float32.

    Args:
        weight: Uniform or NormalFloat weight.
        x: Input, [rows, in].

    Returns:
        Output in float32, [rows, out].
    """
    x, y = x.float().contiguous(), torch.empty(len(x), weight.out)
    _library().float_rows(_at(weight), len(x), _of(x), _of(y))
    return y


def rounded_product(weight: Weight, x: Tensor) -> Tensor:
    """Multiplies an input that is rounded to bf16 with the weight, transposed.

    NormalFloat levels are rounded to bf16 too, and scales are not.

    Args:
        weight: Uniform or NormalFloat weight with codes of at most `LOOKED_UP` bits.
        x: Input, [rows, in].

    Returns:
        Output in float32, [rows, out].
    """
    x, y = x.to(torch.bfloat16).contiguous(), torch.empty(len(x), weight.out)
    product = _library().rounded_rows
    if weight.is_paired():
        x = x.view(len(x), weight.width // CHUNK, CHUNK // 2, 2).transpose(2, 3).contiguous()
        product = _library().paired_rows
    product(_at(weight), len(x), _of(x), _of(y))
    return y


def dequantize(weight: Weight, rows: slice, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dequantizes rows of a weight.

    Args:
        weight: Uniform or NormalFloat weight.
        rows: Rows, with a start and a stop.
        dtype: Float32, which gives the simulation's weight to the bit, or bf16, which rounds it.

    Returns:
        Weight of type `dtype`, [rows, in].
    """
    y = torch.empty(rows.stop - rows.start, weight.width, dtype=dtype)
    half = dtype == torch.bfloat16
    _library().dequantize(_at(weight), rows.start, rows.stop, half, _of(y))
    return y


@cache
def obstacle() -> str | None:
    """Returns why `native.c` cannot run on this machine, or None.

    Raises:
        UserError: If the environment variable `QVLM_WITHOUT` is neither empty nor "native".
    """
    without = os.environ.get(WITHOUT, "")
    if without not in ("", "native"):
        raise UserError(f"{WITHOUT}={without!r} is not a kernel to do without. Choose: native.")
    if without:
        return f"{WITHOUT}=native is set"
    try:
        library = _library()
    except (OSError, subprocess.SubprocessError) as error:
        return " ".join(str(error).split())
    return None if library.supported() else "the CPU has no AVX-512 with VNNI, VBMI and BF16"


@cache
def _library() -> ctypes.CDLL:
    """Loads the compiled library.

    It is not linked to an OpenMP library but uses the one that PyTorch has loaded. So
    `torch.set_num_threads` holds for it, and no second pool of threads competes.

    Raises:
        OSError: If there is no compiler, the compiler fails, or its output does not load.
    """
    with ExitStack() as stack:
        folder = _cache_folder()
        if folder is None:  # a library stays loaded when its file is deleted
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qvlm-")))
        library = ctypes.CDLL(str(_compiled(folder)))
    arguments = {
        "integer_rows": [_pointer] * 3,
        "integer_tiles": [_pointer] * 3,
        "float_rows": [_pointer, _number, *[_pointer] * 2],
        "rounded_rows": [_pointer, _number, *[_pointer] * 2],
        "paired_rows": [_pointer, _number, *[_pointer] * 2],
        "dequantize": [_pointer, *[_number] * 3, _pointer],
    }
    for name, types in arguments.items():
        function = getattr(library, name, None)
        if function is None:
            raise OSError(f"the compiled library has no {name}")
        function.argtypes = types
        function.restype = ctypes.c_int if name.startswith("integer") else None
    return library


def _compiled(folder: Path) -> Path:
    """Returns the path of the library, and compiles it unless this source was compiled before.

    Args:
        folder: Folder that only the user may write.

    Raises:
        OSError: If there is no compiler, or it fails, or the folder cannot be written.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise OSError("there is no C compiler")
    identity = hashlib.sha256(SOURCE.read_bytes() + " ".join([compiler, *FLAGS]).encode())
    stem = f"native-{identity.hexdigest()[:16]}"
    for found in sorted(folder.glob(f"{stem}-*.so")):
        if _is_intact(found):
            return found
        found.unlink(missing_ok=True)
    content = _compile(compiler)
    target = folder / f"{stem}-{_digest(content)}.so"
    write_file(target, content)
    target.chmod(0o600)
    return target


def _compile(compiler: str) -> bytes:
    """Compiles `native.c` and returns the content of the library.

    Raises:
        OSError: If the compiler fails.
    """
    with tempfile.TemporaryDirectory(prefix="qvlm-") as folder:
        made, library = Path(folder, "native.o"), Path(folder, "native.so")
        for command in (
            [compiler, *FLAGS, "-c", str(SOURCE), "-o", str(made)],
            [compiler, "-shared", str(made), "-o", str(library)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                message = (done.stderr.strip().splitlines() or ["it gave no reason"])[0]
                raise OSError(f"the C compiler {compiler} fails: {message}")
        return library.read_bytes()


def _cache_folder() -> Path | None:
    """Returns the folder that keeps libraries, or None if nothing there can be trusted.

    It is a folder itself, not a link to one, belongs to the user, and nobody else may enter it.
    """
    home = os.environ.get("HOME") != "" and os.path.expanduser("~/.cache")
    caches = os.environ.get("XDG_CACHE_HOME") or home or ""
    if not os.path.isabs(caches) or not hasattr(os, "geteuid"):
        return None
    folder = Path(caches, "qvlm")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return None
        if stat.S_IMODE(status.st_mode) != 0o700:
            folder.chmod(0o700)  # what others put there before is not the user's, or not intact
        with tempfile.TemporaryFile(dir=folder):  # a full or read-only disk refuses
            pass
    except OSError:
        return None
    return folder


def _is_intact(file: Path) -> bool:
    """Whether a library is a file of the user that nobody else could write, with its own content.

    Loading a truncated library kills the process, and loading a planted one runs it.
    """
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return False
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return False
        content = file.read_bytes()
    except FileNotFoundError:  # another process has just replaced it
        return False
    return file.stem.rpartition("-")[2] == _digest(content)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _at(weight: Weight) -> int:
    return ctypes.addressof(weight.at)


def _of(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()

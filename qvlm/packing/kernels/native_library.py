"""Calls the products of `native.c` on tensors, and chooses the instruction set that they run on.

`native_build.py` compiles the library. It reads the weight as checkpoints hold it and unpacks codes
in registers. In the notation of `base.py`:

- `integer_product` quantizes the input, and sums t v exactly in int32 over each run of channels
  that share all scales. For few rows it reads the weight as it is stored (`integer_rows` of
  native_rows.h); for many rows it unpacks the weight into tiles (`integer_tiles`). Sums of runs are
  added in float32 for an input in bf16, and in float64 for any other. The output in float64 is then
  rounded once, to what `compute_in_float64` of a simulated layer gives.
- `token_grids` finds the grid of each row of an input that has scales of tokens.
- `linear` is a whole layer in one call: it looks for numbers that are not finite, finds the grids
  of tokens, multiplies as one of these products does, and adds the bias (native_layer.h).
- `quantized_input` quantizes and dequantizes an input for products of floating-point numbers.
- `float_product` multiplies a float input with the dequantized weight, which it makes in registers.
  It serves few rows of inputs whose channels differ in scale, and NormalFloat.
- `rounded_product` does the same in bf16, for models in bf16 and 4-bit codes, and is several times
  faster.
- `dequantize` writes the dequantized weight to memory, for products by other means.
- `walsh_hadamard` transforms rows of numbers.
- `attend` computes the attention of one query of each head to all keys (native_attention.h).

Every instruction set gives the same bits. Without a compiler, or on another CPU, `obstacle` gives
the reason, and other kernels serve. Left out: NormalFloat in blocks that cross rows.
"""

import ctypes
import subprocess
from functools import cache

import torch
from torch import Tensor

from qvlm.errors import RunError
from qvlm.packing.kernels import native_build

# Rows up to which the weight is read once per ROWS rows (see native.c) and not unpacked into tiles.
FEW_ROWS = 8
# Channels of a head that `attend` takes at most.
MAX_HEAD = 512
# Channels that `rounded_rows` multiplies at once.
PAIRED = 64
# Bit width of codes whose values are looked up in bf16.
LOOKED_UP = 4

_NO_MEMORY = "There is not enough memory for a packed product."

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


class _Held:
    """Keeps the tensors whose memory the library reads."""

    def __init__(self) -> None:
        self._held: list[Tensor] = []
        self._places: list[int] = []

    def has_moved(self) -> bool:
        """Whether a tensor has other memory by now, as one that is shared with a process has."""
        return [x.data_ptr() for x in self._held] != self._places

    def _hold(self, x: Tensor) -> int:
        self._held.append(x)
        self._places.append(x.data_ptr())
        return self._places[-1]


class Weight(_Held):
    """A packed weight as `native.c` reads it. One of `uniform` and `normal_float` adds the scales.

    Args:
        codes: Packed codes, [out, bytes] uint8, as `formats` describes them.
        width: Number of input channels.
        bits: Bit width of the codes.
        group: Number of neighboring channels that share a scale. It divides `width` for
            NormalFloat.
    """

    def __init__(self, codes: Tensor, width: int, bits: int, group: int) -> None:
        super().__init__()
        self.width, self.out = width, codes.shape[0]
        self.at = _Weight(
            codes=self._hold(codes),
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
        """Whether each byte holds two codes and groups consist of whole runs of `PAIRED`."""
        paired = self.at.group % PAIRED == 0 and self.width % PAIRED == 0
        return bool(self.at.bits == LOOKED_UP and paired)


def takes(width: int, bits: int, group: int) -> bool:
    """Whether every group of channels begins at a byte of its own.

    Args:
        width: Number of channels.
        bits: Bit width of the codes.
        group: Number of channels in a group.
    """
    return group >= width or group * bits % 8 == 0


class _Layer(ctypes.Structure):
    """`Layer` of native.c: the same fields in the same order."""

    _fields_ = (
        *((name, _pointer) for name in ("weight", "order", "scale", "zero")),
        *((name, _number) for name in ("by_channel", "bits", "integer", "in_steps", "scaled")),
        ("ratio", ctypes.c_float),
    )


class Layer(_Held):
    """A weight with what is made of its input, as `native.c` reads it.

    Args:
        weight: Uniform or NormalFloat weight.
        input_bits: Bit width of the input's codes, 2 to 8.
        grid: Scale and zero point of the input, float32, both one number or both [in] in the order
            of the weight's channels; None for a grid of each row.
        ratio: Clipping ratio of a row's range, for a grid of each row.
        sums: "integer" for `integer_product`, and "scaled" for it times the input's scale, which is
            then that of all channels. "float" for the product of what `quantized_input` returns, by
            `rounded_product` if `x` is in bf16 and the weight `is_paired`, else by `float_product`.
            "steps" for the same with an input in steps.
        order: Channel of the input that each channel of the weight is, [in] int32; None if they are
            the same.
    """

    def __init__(
        self,
        weight: Weight,
        input_bits: int,
        grid: tuple[Tensor, Tensor] | None,
        ratio: float,
        sums: str,
        order: Tensor | None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.integer = sums in ("integer", "scaled")
        self._at = _Layer(
            weight=_at(weight),
            bits=input_bits,
            integer=self.integer,
            in_steps=sums == "steps",
            scaled=sums == "scaled",
            ratio=ratio,
        )
        if order is not None:
            self._at.order = self._hold(order)
        if grid is not None:
            scale, zero_point = (part.contiguous() for part in grid)
            self._at.scale, self._at.zero = self._hold(scale), self._hold(zero_point)
            self._at.by_channel = scale.numel() > 1
        self.at = ctypes.addressof(self._at)

    def has_moved(self) -> bool:
        """Whether a tensor has other memory by now, the weight's included."""
        return super().has_moved() or self.weight.has_moved()


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
    library: str | None = None,
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
        library: Instruction set to compute with, for measurements; None for the preferred one.

    Returns:
        Sums of t v s, [rows, out]: float32 for an input in bf16, float64 for any other.

    Raises:
        RunError: If there is not enough memory.
    """
    inputs, held = _with_grid(x, scale, zero_point, input_bits, order)
    y = _sums(weight, held[0])
    functions = library_of(library) if library else _library()
    product = functions.integer_rows if len(x) <= FEW_ROWS else functions.integer_tiles
    if len(x) and product(_at(weight), ctypes.addressof(inputs), _of(y)):
        raise RunError(_NO_MEMORY)
    return y


# Types of inputs and outputs, as native_layer.h numbers them.
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_FINE = 2
_NOT_FINITE = 2


def linear(
    layer: Layer, x: Tensor, bias: Tensor | None, library: str | None = None
) -> Tensor | None:
    """Computes the output of a layer.

    It is the product that the layer names, plus the bias, in the type of the product's sums, and
    then rounded once.

    Args:
        layer: Layer.
        x: Input, [rows, in].
        bias: Bias, [out] float32 or None.
        library: As for `integer_product`.

    Returns:
        Output, [rows, out]: bf16 or float32 as `x` is, float64 if it is and sums are of integers,
        and float32 otherwise. None if a number of `x` is NaN or infinite.

    Raises:
        RunError: If there is not enough memory.
    """
    fine = x.dtype == torch.float64 and layer.integer
    if x.dtype not in _TYPES:
        x = x.float()
    x = x.contiguous()
    rows = x.shape[0]
    y = torch.empty(rows, layer.weight.out, dtype=torch.float64 if fine else x.dtype)
    if not rows:
        return y
    few = rows <= FEW_ROWS
    # PyTorch's memory is faster where there is much of it, and slower to get.
    sums = y if fine or (not layer.integer and x.dtype == torch.float32) else None
    if sums is None and not few:
        sums = _sums(layer.weight, x)
    functions = library_of(library) if library else _library()
    kind = _FINE if fine else _TYPES[x.dtype]
    failed = functions.linear(
        layer.at, x.data_ptr(), rows, kind, few, _of(bias), _of(sums), y.data_ptr()
    )
    if failed == _NOT_FINITE:
        return None
    if failed:
        raise RunError(_NO_MEMORY)
    return y


def quantized_input(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    order: Tensor | None = None,
    in_steps: bool = False,
    library: str | None = None,
) -> Tensor:
    """Quantizes and dequantizes an input, as `UniformQuantizer` does it, to the bit.

    Args:
        x, scale, zero_point, order, library: As for `integer_product`.
        bits: Bit width of the codes, 2 to 8.
        in_steps: Whether to return q - z, in units of the scale.

    Returns:
        Quantized input with the weight's channels, [rows, in] float32.

    Raises:
        RunError: If there is not enough memory.
    """
    inputs, held = _with_grid(x, scale, zero_point, bits, order)
    y = torch.empty(held[0].shape)
    functions = library_of(library) if library else _library()
    if functions.quantized_input(ctypes.addressof(inputs), in_steps, _of(y)):
        raise RunError(_NO_MEMORY)
    return y


def token_grids(
    x: Tensor, ratio: float, bits: int, library: str | None = None
) -> tuple[Tensor, Tensor]:
    """Computes the grid of each row of an input from the row's own range.

    It is that of `TokenQuantizer`, to the bit.

    Args:
        x: Finite input in bf16 or float32, [rows, in].
        ratio: Clipping ratio, above 0 and up to 1.
        bits: Bit width of the codes, 2 to 8.
        library: As for `integer_product`.

    Returns:
        Scale and zero point, both [rows, 1] float32.
    """
    scale, zero_point = torch.empty(len(x), 1), torch.empty(len(x), 1)
    inputs, held = _input(x, bits)
    functions = library_of(library) if library else _library()
    functions.token_grids(ctypes.addressof(inputs), ratio, _of(scale), _of(zero_point))
    del held  # was read until here
    return scale, zero_point


def _input(x: Tensor, bits: int) -> tuple[_Input, Tensor]:
    """Returns an input as the library reads it, and the tensor whose memory that is."""
    half = x.dtype == torch.bfloat16
    held = (x if half else x.float()).contiguous()
    rows, width = held.shape
    return _Input(x=_of(held), rows=rows, width=width, half=half, bits=bits), held


def _with_grid(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, order: Tensor | None
) -> tuple[_Input, list[Tensor]]:
    """Returns an input with its grid as the library reads it, and the tensors that it reads."""
    inputs, held = _input(x, bits)
    scale, zero_point = scale.contiguous(), zero_point.contiguous()
    inputs.scale, inputs.zero, inputs.order = _of(scale), _of(zero_point), _of(order)
    inputs.by_row = scale.ndim == 2 and scale.shape == (len(x), 1)
    inputs.by_channel = not inputs.by_row and scale.numel() > 1
    return inputs, [held, scale, zero_point]


def _sums(weight: Weight, x: Tensor) -> Tensor:
    """Returns memory for the sums of an input that `_input` has prepared, [rows, out]."""
    dtype = torch.float32 if x.dtype == torch.bfloat16 else torch.float64
    return torch.empty(len(x), weight.out, dtype=dtype)


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
        weight: Uniform or NormalFloat weight that `is_paired`.
        x: Input, [rows, in].

    Returns:
        Output in float32, [rows, out].

    Raises:
        RunError: If there is not enough memory.
    """
    x, y = x.to(torch.bfloat16).contiguous(), torch.empty(len(x), weight.out)
    if _library().rounded_rows(_at(weight), len(x), _of(x), _of(y)):
        raise RunError(_NO_MEMORY)
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


def walsh_hadamard(x: Tensor, library: str | None = None) -> Tensor:
    """Computes `qvlm.quantization.hadamard.walsh_hadamard` of vectors, to the bit.

    Args:
        x: Vectors [..., width] in float32 or float64 on the CPU, of a width that is a power of two.
        library: As for `integer_product`.
    """
    y = x.clone(memory_format=torch.contiguous_format)
    functions = library_of(library) if library else _library()
    double = x.dtype == torch.float64
    function = functions.hadamard_doubles if double else functions.hadamard_floats
    function(_of(y), y.numel() // max(1, x.shape[-1]), x.shape[-1])
    return y


class _Attention(ctypes.Structure):
    """`Attention` of native.c: the same fields in the same order."""

    _fields_ = (
        *((name, _pointer) for name in ("query", "key", "value", "mask", "output")),
        *((name, _number) for name in ("half", "batch", "key_heads", "keys", "width", "shared")),
        *((name, _number * 3) for name in ("key_step", "value_step")),
        ("scale", ctypes.c_float),
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    library: str | None = None,
) -> Tensor:
    """Computes the attention of one query of each head: softmax(scale q k^T) v.

    Scores, softmax and sums are in float32, and the output is rounded once. A query that may attend
    to nothing gets zeros.

    Args:
        query: Queries, [batch, heads, width], where `width` is a multiple of 16 up to `MAX_HEAD`.
        key, value: Keys and values of the type of `query`, bf16 or float32, of shape [batch, key
            heads, keys, width]. Only the channels of a head must be neighbors in memory. Key head i
            serves the heads / key heads queries from i * heads / key heads on.
        mask: Whether a sequence attends to a key, [batch, keys] bool; None for every key.
        scale: Factor of the scores.
        library: As for `integer_product`.

    Returns:
        Output of the type of `query`, [batch, heads, width].

    Raises:
        RunError: If there is not enough memory.
    """
    batch, heads, width = query.shape
    query, y = query.contiguous(), torch.empty_like(query, memory_format=torch.contiguous_format)
    mask = None if mask is None else mask.contiguous()
    inputs = _Attention(
        query=_of(query),
        key=_of(key),
        value=_of(value),
        mask=_of(mask),
        output=_of(y),
        half=query.dtype == torch.bfloat16,
        batch=batch,
        key_heads=key.shape[1],
        keys=key.shape[2],
        width=width,
        shared=heads // key.shape[1],
        key_step=key.stride()[:3],
        value_step=value.stride()[:3],
        scale=scale,
    )
    functions = library_of(library) if library else _library()
    if functions.attend(ctypes.addressof(inputs)):
        raise RunError("There is not enough memory for attention.")
    return y


@cache
def obstacle() -> str | None:
    """Returns why `native.c` cannot run on this machine, or None.

    Raises:
        UserError: If the environment variable `QVLM_WITHOUT` names anything but instruction sets.
    """
    without = native_build.left_out()
    if native_build.NATIVE in without:
        return f"{native_build.WITHOUT}={native_build.NATIVE} is set"
    try:
        _library()
    except (OSError, subprocess.SubprocessError) as error:
        return " ".join(str(error).split())
    return None


@cache
def instruction_set() -> str:
    """Returns the instruction set that the products run on.

    Raises:
        OSError: If this CPU has none of those that there are products for, all that it has are left
            out, there is no compiler, or the compiler fails.
    """
    without, known = native_build.left_out(), ", ".join(native_build.INSTRUCTION_SETS)
    for name in native_build.supported():
        if name not in without:
            return name
    left_out = f" but those of {native_build.WITHOUT}={','.join(without)}" if without else ""
    raise OSError(f"the CPU has none of the instruction sets {known}{left_out}")


@cache
def _library() -> ctypes.CDLL:
    return library_of(instruction_set())


@cache
def library_of(name: str) -> ctypes.CDLL:
    """Returns the library of an instruction set that this machine supports.

    Raises:
        OSError: If there is no compiler, the compiler fails, or its output does not load.
    """
    library = native_build.library(name)
    arguments = {
        "integer_rows": [_pointer] * 3,
        "integer_tiles": [_pointer] * 3,
        "token_grids": [_pointer, ctypes.c_float, *[_pointer] * 2],
        "linear": [*[_pointer] * 2, *[_number] * 3, *[_pointer] * 3],
        "quantized_input": [_pointer, _number, _pointer],
        "float_rows": [_pointer, _number, *[_pointer] * 2],
        "rounded_rows": [_pointer, _number, *[_pointer] * 2],
        "dequantize": [_pointer, *[_number] * 3, _pointer],
        "attend": [_pointer],
        "hadamard_floats": [_pointer, *[_number] * 2],
        "hadamard_doubles": [_pointer, *[_number] * 2],
    }
    can_fail = (
        *("attend", "integer_rows", "integer_tiles", "quantized_input", "rounded_rows"),
        "linear",
    )
    for function_name, types in arguments.items():
        function = getattr(library, function_name, None)
        if function is None:
            raise OSError(f"the compiled library has no {function_name}")
        function.argtypes = types
        function.restype = ctypes.c_int if function_name in can_fail else None
    return library


def _at(weight: Weight) -> int:
    return ctypes.addressof(weight.at)


def _of(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()

"""A linear layer that keeps packed codes and computes with them.

It computes the function of the `QuantLinear` it was made of. The integers are the same to the bit:
`integers()` of the weight, `input_steps(x)` of an input. Outputs differ by the rounding of sums
only; `accumulation_bound` says by how much at most. In a model in float32, `native` and `int_mm`
round an output once, as `QuantLinear.compute_in_float64` does.

Which product runs is chosen in the call from device, rows and bits (`choose`), can be forced by
`kernel`, and is noted in `used`. See `kernels.py` and `triton_kernels.py` for the products.

Left out: gradients, and a floating-point copy of the weight in any form.
"""

import math
import os
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.config import KERNELS as KERNELS
from qvlm.errors import RunError, UserError
from qvlm.packing import kernels, native
from qvlm.packing.formats import (
    Constants,
    decode_constants,
    pack,
    packed_width,
    unit,
    unpack,
)
from qvlm.quantization.linear import QuantLinear
from qvlm.quantization.normal_float import (
    NormalFloatQuantizer,
    dynamic_levels,
    normal_float_levels,
)
from qvlm.quantization.quantizer import (
    Quantizer,
    TokenQuantizer,
    UniformQuantizer,
    affine_grid,
)

# Rows up to which the int4 product is taken: it reads the weight as it is stored, while int8 x int8
# unpacks it first, which only many rows repay.
DECODING_ROWS = 16
# Channels that a cell of `int_mm` needs on average: below, scaling costs more than the product.
CELL_WIDTH = 32
# Rows up to which a float weight is better made in registers, row by row, than in memory once.
FLOAT_ROWS = 32


@dataclass(frozen=True)
class Form:
    """What there is to know of a packed layer but its numbers; plain values for a config file.

    Attributes:
        weight: "uniform" or "normal_float".
        weight_bits, input_bits: 2 to 8.
        group_size: weights that share a scale (or a NormalFloat constant); `in_features` where a
            row or the whole weight does.
        scale_shape: of the uniform weight's scales, [out or 1, groups]; [] for NormalFloat.
        constants: shapes of NormalFloat constants: (codes or 0, largest), see `Constants`.
        constant_block_size: constants that share an entry of `largest`.
        ordered: channels are stored cluster by cluster, and each group lies in one cluster of the
            input, so that its channels share both scales.
        inputs: "token" (dynamic) or "static".
        input_shape: of the static input scales.
        folds: input scales are in the weight already.
        ratio: of dynamic ranges.
    """

    in_features: int
    out_features: int
    bias: bool
    weight: str
    weight_bits: int
    group_size: int
    scale_shape: tuple[int, ...]
    inputs: str
    input_bits: int
    input_shape: tuple[int, ...] = ()
    folds: bool = False
    ratio: float = 1.0
    constants: tuple[int, ...] = ()
    constant_block_size: int = 1
    ordered: bool = False


class PackedLinear(nn.Module):
    """y = x_hat W_hat^T + b from packed codes.

    Float32 numbers are stored as int32 of the same bits, so that `.to(bfloat16)` or a loader that
    casts what is floating point cannot round them: scales decide about integers.

    Args:
        form: sizes and kinds; the numbers are empty until they are loaded (see `from_quantized`).
        kernel: one of `KERNELS`.
        layer_name: the full name in the model.

    Attributes:
        codes: packed weight; [out, bytes] uint8 as `formats` says, or, while `int4_layout` is
            true, in that of the stock int4 product, of the same size.
        order: where `form.ordered`, the channels as codes and static input scales have them, [in]
            int32. Methods take and give channels in their own order.
        used: name of the kernel to how many calls it served.

    Raises:
        UserError: for a kernel that does not exist or cannot take this layer.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    input_scale: Tensor
    input_zero_point: Tensor
    order: Tensor
    constant_codes: Tensor
    mean: Tensor
    bias: Tensor | None

    def __init__(self, form: Form, kernel: str = "auto", layer_name: str = "") -> None:
        super().__init__()
        self.form = form
        self.in_features, self.out_features = form.in_features, form.out_features
        self.layer_name = layer_name
        self.int4_layout = False
        self.used: Counter[str] = Counter()
        self._cells: list[kernels.Cell] | None = None
        self._shared: str | None = None
        self._kept_offsets: Tensor | None = None
        self._kept_levels: tuple[Tensor, Tensor] | None = None
        for name, (shape, dtype) in buffers(form).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype))
        if not form.bias:
            self.register_buffer("bias", None)
        self.kernel = kernel

    @classmethod
    @torch.no_grad()
    def from_quantized(cls, layer: QuantLinear, kernel: str = "auto") -> "PackedLinear":
        """Packs a quantized linear, which is left as it is.

        Raises:
            UserError: naming the layer, if its quantizers have no packed form.
            RunError: if its weight is not what its codes stand for.
        """
        name = layer.layer_name or "a linear"
        quantizer, weight = layer.weight_quantizer, layer.quantized_weight()
        codes = quantizer.encode(weight)
        # Equal as numbers: a code of zero may stand for a negative zero.
        if not bool((quantizer.decode(codes) == weight).all()):
            raise RunError(f"the weight of {name} is not on the grid of its quantizer")
        order = quantizer.order if isinstance(quantizer, UniformQuantizer) else None
        form, numbers = _weight_numbers(layer, codes if order is None else codes[:, order])
        more, input_numbers = _input_numbers(layer, order)
        if order is not None:
            numbers["order"] = order.int()
        packed = cls(Form(**form, **more), "auto", layer.layer_name)
        numbers |= input_numbers
        if layer.bias is not None:
            numbers["bias"] = _as_bits(layer.bias)
        for key, value in numbers.items():
            setattr(packed, key, value.detach().clone().contiguous())
        packed.kernel = kernel
        return packed

    @property
    def kernel(self) -> str:
        """The kernel that was asked for."""
        return self._kernel

    @kernel.setter
    def kernel(self, kernel: str) -> None:
        if kernel not in KERNELS:
            raise UserError(f"kernel={kernel!r}: accepted are {', '.join(KERNELS)}")
        if kernel != "auto" and kernel not in self.serving():
            obstacles = {"triton": self._triton_obstacle, "native": self._native_obstacle}
            reason = f" ({obstacles[kernel]()})" if kernel in obstacles else ""
            raise UserError(
                f"kernel={kernel!r} cannot take {self.layer_name or 'a linear'}{reason}: accepted "
                f"are auto, {', '.join(self.serving())}"
            )
        self._kernel = kernel

    def serving(self) -> list[str]:
        """The kernels that can take this layer where it is."""
        form, names = self.form, ["reference", "bf16"]
        if self._native_obstacle() is None:
            names.append("native")
        if self._triton_obstacle() is None:
            names.append("triton")
        if form.weight != "uniform":
            return names
        if self.codes.device.type == "cpu" or self.codes.is_meta:
            if form.in_features <= kernels.INT_MM_WIDTH:
                names.append("int_mm")
            if form.weight_bits == 4 and self._int4_group() is not None:
                names.append("int4_weight_only")
        return names

    def choose(self, rows: int, dtype: torch.dtype = torch.float32) -> str:
        """The kernel for an input of so many rows, in a model of this type.

        Products that round operands to bf16 are for models that do so themselves. Warns, once for
        a reason, if Triton cannot run on the layer's GPU.
        """
        if self.kernel != "auto":
            return self.kernel
        device, rounding = self.codes.device, dtype == torch.bfloat16
        # First what is quickly known: this is asked in every call.
        native_serves = device.type == "cpu" and self._native_obstacle() is None
        if native_serves and (self._is_integer() or rows <= FLOAT_ROWS):
            return "native"
        serving = self.serving()
        if device.type == "cuda":
            if "triton" in serving:
                return "triton"
            if (obstacle := _device_obstacle(device)) is not None:
                _warn_once(obstacle)
        if "int4_weight_only" in serving and rounding and rows <= DECODING_ROWS:
            return "int4_weight_only"
        if "int_mm" in serving and self.in_features >= CELL_WIDTH * len(self.cells()):
            return "int_mm"
        return "bf16" if rounding else "reference"

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in] to [..., out] in the dtype of `x`.

        Raises:
            RunError: if `x` holds NaN or infinity; while a CUDA graph is captured nothing can be
                raised, and the outputs of such a row are NaN (see `triton_products.py`).
        """
        rows = x.reshape(-1, self.in_features)
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if (
            not capturing
            and not math.isfinite(rows.sum(dtype=torch.float32).item())
            and not bool(torch.isfinite(rows).all())
        ):
            raise RunError(f"the input of {self.layer_name or 'a linear'} is not finite")
        kernel = self.choose(len(rows), x.dtype)
        self.used[kernel] += 1
        bias = None if self.bias is None else self.bias.view(torch.float32)
        if kernel == "triton":
            y = self._fused(rows, bias)
        else:
            y = self._product(kernel, rows)
            if bias is not None:
                y += bias
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def working_bytes(self, rows: int) -> int:
        """About what a call for so many rows takes at once beside its input, on this machine.

        For a model in bf16. The output twice in float32, and the input: its steps where integers
        are multiplied natively, for scales of tokens in float32 as well; otherwise three times in
        float32. The weight's part: where it is made float, a piece of it; where stock products take
        its codes, these, and for the int4 layout 32 bits of each.
        """
        output, entries = 8 * rows * self.out_features, rows * self.in_features
        weight = self.in_features * self.out_features
        natively = self._native_obstacle() is None
        if natively and self._is_integer():
            return output + entries * (5 if self.form.inputs == "token" else 1)
        if natively:
            return output + 12 * entries + 4 * min(weight, kernels.PIECE)
        return output + 12 * entries + weight * (5 if "int4_weight_only" in self.serving() else 1)

    def channels(self) -> Tensor:
        """The channels in the order in which they are stored, [in] integers."""
        if self.form.ordered:
            return self.order
        return torch.arange(self.in_features, device=self.codes.device)

    def integers(self) -> Tensor:
        """The codes of the weight, [out, in] uint8."""
        return self._in_place(self._integers())

    def input_steps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q - z of an input [rows, in], [rows, in] float32; and its scale and z, to broadcast.

        A folded scale is one.
        """
        steps, scale, zero_point = self._steps(self._as_stored(x))
        return self._in_place(steps), self._in_place(scale), self._in_place(zero_point)

    def weight_scales(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of a uniform weight, [out, groups] float32."""
        shape = (self.out_features, self.form.scale_shape[1])
        scale = self.scale.view(torch.float32).expand(shape)
        return scale, self.zero_point.float().expand(shape)

    def dequantized(self, rows: slice | None = None) -> Tensor:
        """Rows of the float32 weight [out, in], the one that the quantized layer kept."""
        return self._in_place(self._dequantized(rows or slice(0, self.out_features)))

    @torch.no_grad()
    def simulated(self) -> QuantLinear:
        """The quantized linear that this one was made of, which computes the same to the bit."""
        form = self.form
        weights: Quantizer
        if form.weight == "uniform":
            scale, zero_point = (part[..., None] for part in self.weight_scales())
            order = self.order.long() if form.ordered else None
            weights = UniformQuantizer(
                form.weight_bits, scale, zero_point, form.group_size, order=order
            )
        else:
            constants = self._constants()
            weights = NormalFloatQuantizer(form.weight_bits, form.group_size, constants, constants)
        inputs: Quantizer
        if form.inputs == "token":
            inputs = TokenQuantizer(form.input_bits, form.ratio)
        else:
            scale = self._in_place(self.input_scale.view(torch.float32))
            zero_point = self._in_place(self.input_zero_point.float())
            inputs = UniformQuantizer(form.input_bits, scale, zero_point, folds=form.folds)
        bias = None if self.bias is None else self.bias.view(torch.float32)
        return QuantLinear(self.dequantized(), bias, weights, inputs, self.layer_name)

    def cells(self) -> list[kernels.Cell]:
        """The runs of channels, as stored, whose products are exact; found once, then kept."""
        if self._cells is None:
            self._cells = kernels.find_cells(
                self.in_features, self.form.group_size, self._channel_scale()
            )
        return self._cells

    def reads_alike(self, other: "PackedLinear") -> bool:
        """Whether a product of both weights, one above the other, is a product of this form.

        So it is where both are uniform, have scales of their own for each output, and quantize
        their input alike.
        """
        forms = [
            replace(layer.form, out_features=0, scale_shape=layer.form.scale_shape[1:])
            for layer in (self, other)
        ]
        if forms[0] != forms[1] or self.form.weight != "uniform" or self.form.scale_shape[0] == 1:
            return False
        names = {"input_scale", "input_zero_point", "order"} & set(self._buffers)
        return all(torch.equal(getattr(self, name), getattr(other, name)) for name in names)

    def rows_layout(self) -> None:
        """Brings the codes into the layout that checkpoints hold."""
        if self.int4_layout:
            self.codes = pack(kernels.from_int4_layout(self.codes), 4)
            self.int4_layout = False

    def extra_repr(self) -> str:
        form = self.form
        return (
            f"in_features={form.in_features}, out_features={form.out_features}, "
            f"weight={form.weight}{form.weight_bits}, inputs={form.inputs}{form.input_bits}"
        )

    def _as_stored(self, x: Tensor) -> Tensor:
        """An input [rows, in] with its channels in the order of the codes."""
        return x.index_select(1, self.order) if self.form.ordered else x

    def _in_place(self, x: Tensor) -> Tensor:
        """Something [..., in] in the order of the codes with its channels in their own order."""
        if not self.form.ordered or not x.ndim or x.shape[-1] != self.in_features:
            return x
        return torch.empty_like(x).index_copy_(x.ndim - 1, self.order.long(), x)

    def _integers(self) -> Tensor:
        if self.int4_layout:
            return kernels.from_int4_layout(self.codes)
        return unpack(self.codes, self.form.weight_bits, self.in_features)

    def _steps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`input_steps` with channels as they are stored, in `x` and in what is returned."""
        x = x.float()
        scale, zero_point = self._input_grid(x)
        steps = (x / scale).round_()
        torch.maximum(steps, -zero_point, out=steps)
        torch.minimum(steps, 2**self.form.input_bits - 1 - zero_point, out=steps)
        return steps, torch.ones_like(scale) if self.form.folds else scale, zero_point

    def _dequantized(self, rows: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """`dequantized` with channels as they are stored, in float32 or rounded to bf16."""
        form = self.form
        self.rows_layout()
        if self._native_obstacle() is None:
            return native.dequantize(self._native_weight(), rows, dtype)
        codes = unpack(self.codes[rows], form.weight_bits, self.in_features)
        if form.weight == "uniform":
            scale, zero_point = (part[rows] for part in self.weight_scales())
            return kernels.dequantize(codes, scale, zero_point, form.group_size).to(dtype)
        values = _levels(form.weight_bits).to(codes.device)[codes.int()]
        begin, end = (row * self.in_features for row in (rows.start, rows.stop))
        first, size = begin // form.group_size, form.group_size
        used = self._constants()[first : -(-end // size)].repeat_interleave(size)
        return (values * used[begin - first * size :][: values.numel()].view_as(values)).to(dtype)

    def _product(self, kernel: str, x: Tensor) -> Tensor:
        if kernel == "native" and self._is_integer():
            return self._integer_product(x)
        steps, scale, zero_point = self._steps(self._as_stored(x))
        shared = self._shares_scale(scale)
        if kernel in ("reference", "bf16"):
            dtype = torch.bfloat16 if kernel == "bf16" else torch.float32
            x_hat = (steps * scale).to(dtype)
            parts = kernels.pieces(self.out_features, self.in_features)
            made = [x_hat @ self._dequantized(part, dtype).T for part in parts]
            return torch.cat(made, dim=1).float()
        if kernel == "native":
            self.rows_layout()
            multiply = native.rounded_product if self._rounds(x) else native.float_product
            return multiply(self._native_weight(), steps * scale)
        weight_scale, weight_zero_point = self.weight_scales()
        if kernel == "int4_weight_only":
            size = self._int4_group()
            assert size is not None
            if not self.int4_layout:
                self.codes, self.int4_layout = kernels.to_int4_layout(self._integers()), True
            repeats = self.in_features // size // weight_scale.shape[1]
            y = kernels.int4_weight_only(
                steps if shared else steps * scale,
                self.codes,
                weight_scale.repeat_interleave(repeats, 1),
                weight_zero_point.repeat_interleave(repeats, 1),
                size,
            )
            return y * scale if shared else y
        cells = self.cells()
        products = kernels.int_products(
            steps,
            zero_point,
            self.form.input_bits,
            self._integers(),
            weight_zero_point,
            self.form.weight_bits,
            cells,
        )
        # As `native.integer_product`: in a model in float32, sums are rounded once, at the end.
        sums = torch.float32 if x.dtype == torch.bfloat16 else torch.float64
        y = torch.zeros(len(x), self.out_features, dtype=sums, device=x.device)
        for cell, product in zip(cells, products, strict=True):
            factor = weight_scale[:, cell.group].to(sums)
            if not shared:
                factor = factor * scale.expand(self.in_features)[cell.channel]
            y.addcmul_(product.to(sums), factor)
        return y * scale if shared else y

    def _integer_product(self, x: Tensor) -> Tensor:
        self.rows_layout()
        scale, zero_point = self._input_grid(x)
        order = self.order if self.form.ordered else None
        weight, bits = self._native_weight(), self.form.input_bits
        y = native.integer_product(weight, x, scale, zero_point, bits, order)
        if self.form.folds or self._sharing() == "group":
            return y
        return y.mul_(scale if self._shares_scale(scale) else scale[0])

    def _constants(self) -> Tensor:
        """The constants of NormalFloat blocks, [blocks] float32."""
        return decode_constants(
            self.constant_codes if self.form.constants[0] else None,
            self.scale.view(torch.float32),
            self.mean.view(torch.float32),
            self.form.constant_block_size,
        )

    def _fused(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The output of Triton's kernels, [rows, out] in the dtype of `x`."""
        from qvlm.packing import triton_kernels

        form = self.form
        self.rows_layout()
        if form.weight != "uniform" or self._chunk() is not None:
            return self._in_chunks(x.contiguous(), bias)
        x = self._as_stored(x)
        return triton_kernels.linear(
            x,
            *self._input_grid(x),
            form.input_bits,
            self.codes,
            self.scale.view(torch.float32),
            self.zero_point,
            form.weight_bits,
            form.group_size,
            form.folds,
            self._sharing() == "group",
            bias,
        )

    def _in_chunks(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`_fused` by the products of `triton_products`."""
        from qvlm.packing import triton_products

        form, chunk = self.form, self._chunk()
        if form.inputs == "token":
            grid = triton_products.token_grid(x, form.input_bits, form.ratio)
        else:
            grid = self._static_grid()
        if form.weight != "uniform":
            levels, constant_levels = self._levels_here()
            coded = bool(form.constants[0])
            return triton_products.float_linear(
                x,
                *grid,
                form.input_bits,
                form.folds,
                self.codes,
                levels,
                self.constant_codes if coded else None,
                self.scale.view(torch.float32),
                self.mean.view(torch.float32),
                constant_levels if coded else None,
                form.constant_block_size,
                form.group_size,
                bias,
            )
        assert chunk is not None
        q, sums = triton_products.quantize(x, *grid, **self.input_layout())
        return self.multiply(q, sums, grid, x.dtype, bias)

    def input_layout(self) -> dict[str, Any]:
        """`bits`, `planes`, `chunk` and `order`, as `triton_products.quantize` takes them."""
        chunk, order = self._chunk(), self.order if self.form.ordered else None
        assert chunk is not None
        planes = unit(self.form.weight_bits)[0]
        return {"bits": self.form.input_bits, "planes": planes, "chunk": chunk, "order": order}

    def multiply(
        self,
        q: Tensor,
        sums: Tensor,
        grid: tuple[Tensor, Tensor],
        dtype: torch.dtype,
        bias: Tensor | None,
    ) -> Tensor:
        """The output [rows, out] of an input that `triton_products` has quantized."""
        from qvlm.packing import triton_products

        form, chunk = self.form, self._chunk()
        assert chunk is not None
        return triton_products.multiply(
            q,
            sums,
            *grid,
            form.input_bits,
            self.codes,
            self.scale.view(torch.float32),
            self.zero_point,
            form.weight_bits,
            chunk,
            dtype,
            form.folds,
            self._sharing() == "group",
            bias,
            self._offsets(chunk),
        )

    def static_grid(self) -> tuple[Tensor, Tensor] | None:
        """Scale and zero point of a static input that `multiply` takes on this device, or None."""
        chunks = self.form.weight == "uniform" and self._chunk() is not None
        if self.form.inputs != "static" or not chunks or self.choose(1, torch.bfloat16) != "triton":
            return None
        return self._static_grid()

    def _static_grid(self) -> tuple[Tensor, Tensor]:
        return self.input_scale.view(torch.float32), self.input_zero_point

    def _chunk(self) -> int | None:
        """The chunk of `triton_products`, or None if the layer does not come in such chunks."""
        from qvlm.packing import triton_products

        form = self.form
        return triton_products.chunk(form.weight_bits, form.group_size, form.in_features)

    def _offsets(self, chunk: int) -> Tensor | None:
        """What `triton_products.offsets` says of inputs of 8 bits; made once, then kept."""
        kept = self._kept_offsets
        if self.form.input_bits == 8 and (kept is None or kept.device != self.codes.device):
            from qvlm.packing import triton_products

            static = self.input_zero_point if self.form.inputs == "static" else None
            bits = self.form.weight_bits
            self._kept_offsets = triton_products.offsets(self._integers(), bits, static, chunk)
        return self._kept_offsets

    def _levels_here(self) -> tuple[Tensor, Tensor]:
        """The levels of NormalFloat weights and constants, on the layer's device."""
        device = self.codes.device
        if self._kept_levels is None or self._kept_levels[0].device != device:
            levels = _levels(self.form.weight_bits).to(device), _constant_levels().to(device)
            self._kept_levels = levels
        return self._kept_levels

    def _input_grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of an input [rows, in], to broadcast; float32."""
        form = self.form
        if form.inputs == "static":
            return self.input_scale.view(torch.float32), self.input_zero_point.float()
        x = x.float()
        lo, hi = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        return affine_grid(lo * form.ratio, hi * form.ratio, form.input_bits)

    def _is_integer(self) -> bool:
        """Whether the channels of a weight group share all scales, so that steps multiply codes."""
        return self.form.weight == "uniform" and self._sharing() != "none"

    def _group_scale(self) -> Tensor | None:
        """Scales [groups] of an input whose channels share them by weight group, or None."""
        if self._sharing() != "group":
            return None
        return self.input_scale.view(torch.float32)[:: self.form.group_size].contiguous()

    def _channel_scale(self) -> Tensor | None:
        """Scales [in] of stored channels that differ, or None if they do not, or are folded."""
        return None if self._sharing() == "all" else self.input_scale.view(torch.float32)

    def _sharing(self) -> str:
        """Which channels share the scale of the input: all, those of a weight group, or none.

        Folded scales count as shared. Found once there are numbers, then kept.
        """
        form = self.form
        if form.inputs != "static" or form.folds or not form.input_shape:
            return "all"
        if self.input_scale.is_meta:
            return "group" if form.ordered else "none"
        if self._shared is None:
            groups = self.input_scale.split(form.group_size)
            by_group = all(bool((group == group[0]).all()) for group in groups)
            alike = by_group and bool((self.input_scale == self.input_scale[0]).all())
            self._shared = "all" if alike else "group" if by_group else "none"
        return self._shared

    def _rounds(self, x: Tensor) -> bool:
        """Whether the native product of an input rounds to bf16."""
        return x.dtype == torch.bfloat16 and self.form.weight_bits <= native.LOOKED_UP

    def _native_weight(self) -> native.Weight:
        """The weight as `native.c` reads it."""
        form = self.form
        weight = native.Weight(self.codes, self.in_features, form.weight_bits, form.group_size)
        if form.weight == "uniform":
            return weight.uniform(self.scale, self.zero_point, self._group_scale())
        return weight.normal_float(
            _levels(form.weight_bits),
            self.scale,
            self.constant_codes if form.constants[0] else None,
            _constant_levels(),
            self.mean.view(torch.float32).item(),
            form.constant_block_size,
        )

    def _native_obstacle(self) -> str | None:
        """Why `native.c` cannot take this layer where it is, or None."""
        form = self.form
        if self.codes.device.type != "cpu" and not self.codes.is_meta:
            return "it is not on the CPU"
        if not native.takes(self.in_features, form.weight_bits, form.group_size):
            return f"its groups of {form.group_size} weights begin inside a byte"
        if form.weight != "uniform" and self.in_features % form.group_size:
            return f"its blocks of {form.group_size} weights cross rows"
        return native.obstacle()

    def _triton_obstacle(self) -> str | None:
        """Why Triton's kernels cannot take this layer where it is, or None."""
        form = self.form
        if form.weight != "uniform":
            if form.weight_bits != 4 or self._chunk() is None:
                return "its weight is neither uniform nor NormalFloat of 4 bits in blocks of 64"
            return _device_obstacle(self.codes.device)
        if not self._is_integer():
            return "the channels of a weight group differ in the scale of their inputs"
        if form.scale_shape[1] > 1 and form.group_size % unit(form.weight_bits)[0]:
            return f"its groups of {form.group_size} weights begin inside a byte"
        return _device_obstacle(self.codes.device)

    def _shares_scale(self, scale: Tensor) -> bool:
        """Whether all channels of a token share `scale`."""
        return scale.numel() == 1 or self.form.inputs == "token"

    def _int4_group(self) -> int | None:
        return kernels.int4_group_size(self.out_features, self.in_features, self.form.group_size)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.rows_layout()
        super()._save_to_state_dict(*args, **kwargs)


def buffers(form: Form) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of everything that a layer of this form stores."""
    out, bits = form.out_features, torch.int32
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "codes": ((out, packed_width(form.in_features, form.weight_bits)), torch.uint8)
    }
    if form.weight == "uniform":
        found["scale"] = (tuple(form.scale_shape), bits)
        found["zero_point"] = (tuple(form.scale_shape), torch.uint8)
    else:
        found["scale"] = ((form.constants[1],), bits)
        found["mean"] = ((1,), bits)
        if form.constants[0]:
            found["constant_codes"] = ((form.constants[0],), torch.uint8)
    if form.inputs == "static":
        found["input_scale"] = (tuple(form.input_shape), bits)
        found["input_zero_point"] = (tuple(form.input_shape), torch.uint8)
    if form.ordered:
        found["order"] = ((form.in_features,), torch.int32)
    if form.bias:
        found["bias"] = ((out,), bits)
    return found


def _weight_numbers(layer: QuantLinear, codes: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    quantizer, name = layer.weight_quantizer, layer.layer_name or "a linear"
    form: dict[str, Any] = {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": layer.bias is not None,
        "weight_bits": quantizer.bits,
    }
    numbers = {"codes": pack(codes, quantizer.bits)}
    if isinstance(quantizer, NormalFloatQuantizer):
        constants = Constants.of(quantizer)
        count = 0 if constants.codes is None else len(constants.codes)
        form |= {
            "weight": "normal_float",
            "group_size": quantizer.block_size,
            "scale_shape": (),
            "constants": (count, len(constants.largest)),
            "constant_block_size": constants.block_size,
        }
        numbers |= {"scale": _as_bits(constants.largest), "mean": _as_bits(constants.mean)}
        if constants.codes is not None:
            numbers["constant_codes"] = constants.codes
        return form, numbers
    if not isinstance(quantizer, UniformQuantizer) or quantizer.clusters is not None:
        raise UserError(
            f"the weight of {name} cannot be packed: accepted are uniform quantizers (per tensor, "
            "channel or group) and NormalFloat"
        )
    scale, zero_point = quantizer.scale, quantizer.zero_point
    # [], [out, 1] or [out, groups, 1] become [1 or out, groups].
    scale, zero_point = (
        part.flatten(1) if part.ndim > 1 else part.reshape(1, 1) for part in (scale, zero_point)
    )
    form |= {
        "weight": "uniform",
        "group_size": quantizer.group_size or layer.in_features,
        "scale_shape": tuple(scale.shape),
        "ordered": quantizer.order is not None,
    }
    return form, numbers | {"scale": _as_bits(scale), "zero_point": zero_point.to(torch.uint8)}


def _input_numbers(
    layer: QuantLinear, order: Tensor | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    quantizer = layer.input_quantizer
    if isinstance(quantizer, TokenQuantizer):
        return {"inputs": "token", "input_bits": quantizer.bits, "ratio": quantizer.ratio}, {}
    if not isinstance(quantizer, UniformQuantizer) or quantizer.group_size is not None:
        raise UserError(
            f"the input of {layer.layer_name or 'a linear'} cannot be packed: accepted are "
            "quantizers per tensor, token, channel or cluster of channels"
        )
    form = {
        "inputs": "static",
        "input_bits": quantizer.bits,
        "input_shape": tuple(quantizer.scale.shape),
        "folds": quantizer.folds,
    }
    scale, zero_point = quantizer.scale, quantizer.zero_point
    if order is not None and scale.ndim:
        scale, zero_point = scale[order], zero_point[order]
    return form, {
        "input_scale": _as_bits(scale),
        "input_zero_point": zero_point.to(torch.uint8),
    }


def _device_obstacle(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a device, or None. A CPU does not even import Triton."""
    if device.type != "cuda" and (device.type != "cpu" or "TRITON_INTERPRET" not in os.environ):
        return "it is not on a GPU"
    from qvlm.packing import triton_kernels

    return triton_kernels.obstacle(device)


@cache
def _levels(bits: int) -> Tensor:
    return normal_float_levels(bits)


@cache
def _constant_levels() -> Tensor:
    return dynamic_levels()


@cache
def _warn_once(obstacle: str) -> None:
    warnings.warn(f"packed layers use stock operators: {obstacle}", RuntimeWarning, stacklevel=2)


def _as_bits(x: Tensor) -> Tensor:
    """Float32 numbers as int32 of the same bits."""
    return x.detach().float().contiguous().view(torch.int32)


@torch.no_grad()
def accumulation_bound(layer: PackedLinear, x: Tensor, kernel: str) -> Tensor:
    """How far apart packed and simulated outputs can be, [rows, out], for an input [rows, in].

    Both are sums of K products t c d v s, in float32 (u = 2^-24). Rounded at most: x_hat twice,
    w_hat once, the product once, K additions, the token's scale and the bias: (K + 6) u of the sum
    A of absolute values, twice (packed and simulated); `int_mm` rounds less often (in float32 per
    cell the conversion, two factors and the addition; in float64 only at the end). So does
    `triton`: its sums of t v over a tile, or over a unit of codes, are exact and at most 2^24,
    which float32 holds; each is multiplied by s and added (at most K of both, fused or not, in any
    order), then d and the bias round once each. `native` adds exact sums of cells, or of 16 lanes
    of cells, as `int_mm` does; where it makes the float weight, it rounds as the simulation does,
    or, for an input in bf16, as `bf16`.

    `bf16` rounds x_hat, w_hat and its output once more, 3 u with u = 2^-8; `triton` rounds x_hat
    and w_hat so where weights are NormalFloat.

    The bf16 of `int4_weight_only` (u = 2^-8) rounds its scale, its input where channels differ in
    scale, the weight that it multiplies and its output: 4 u of the sum of |x| |q - 8| s, as
    `kernels.int4_weight_only` splits the weight. A factor of 1.01 covers products of errors, and a
    tiny number those lost below the normal range.
    """
    steps, scale, _ = layer.input_steps(x.reshape(-1, layer.in_features))
    x_hat = (steps * scale).double().abs()
    total = x_hat @ layer.dequantized().double().abs().T
    if layer.bias is not None:
        total += layer.bias.view(torch.float32).double().abs()
    unit = 2 * (layer.in_features + 6) * 2.0**-24
    bound = unit * total
    float_weight = layer.form.weight != "uniform"
    if (
        kernel == "bf16"
        or (kernel == "native" and not layer._is_integer() and layer._rounds(x))
        or (kernel == "triton" and float_weight)
    ):
        bound = bound + 3 * 2.0**-8 * total
    if kernel == "int4_weight_only":
        weight_scale, _ = layer.weight_scales()
        eight = kernels.dequantize(
            layer.integers(), weight_scale, torch.full_like(weight_scale, 8), layer.form.group_size
        )
        split = x_hat @ eight.double().abs().T
        rest = x_hat.sum(1, keepdim=True) * 8 * weight_scale.double().amax(1)
        bound = bound + 4 * 2.0**-8 * split + unit * (split + rest)
    return 1.01 * bound + 1e-36

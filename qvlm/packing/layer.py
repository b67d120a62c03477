"""A linear layer that keeps packed codes and computes with them.

It computes the function of the `QuantLinear` that it was made of. The integers are equal: the codes
of the weight (`weight_codes`) and the steps of an input (`input_steps`). Outputs differ only in how
sums are rounded, by at most `kernels.bounds.accumulation_bound`. In a model in float32, the kernels
`native` and `int_mm` round each output once, as `QuantLinear.compute_in_float64` does. In a model
in float64, every kernel that runs sums in float64, as the simulation does.

A kernel is chosen from device, number of rows and bit widths (`choose`), and among those that give
the same answers by what they take (`kernels.measured`), unless `kernel` forces one. The counter
`used` says which kernels ran. See `kernels` for the products.

Left out: gradients, and a floating-point copy of the whole weight.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.errors import UserError
from qvlm.packing import kernels
from qvlm.packing.absmax import dequantize_absmax
from qvlm.packing.form import Form, buffers, pack_numbers
from qvlm.packing.formats import pack, unpack
from qvlm.packing.kernels import AUTO, Kernel, fits_dtype, kernel_named
from qvlm.packing.kernels.native import walsh_hadamard_on
from qvlm.packing.kernels.reference import float_weight
from qvlm.quantization.hadamard import hadamard_transform
from qvlm.quantization.linear import QuantLinear
from qvlm.quantization.position_quantizer import require_positions
from qvlm.quantization.quantizer import affine_grid

# Number of rows, type of the input, number of threads and device.
Asked = tuple[int, torch.dtype, int, torch.device]


class PackedLinear(nn.Module):
    """y = x_hat W_hat^T + b, from packed codes.

    Methods take and return channels in their own order, which is that of the input. Those whose
    names say `stored` use the order of the codes; kernels compute with these, on an input that is
    already transformed if the form says `hadamard`.

    Args:
        form: Sizes and kinds of the layer. The buffers are empty until numbers are loaded into
            them; `from_quantized` makes a layer with its numbers.
        kernel: "auto", or the name of the kernel to use.
        layer_name: Full name of the layer in the model, for messages.

    Attributes:
        codes: Packed codes of the weight, [out, bytes] uint8, in the layout that `formats`
            describes or, if `layout` is set, in that of a kernel.
        layout: Name of the kernel whose layout `codes` has, or None.
        order: Only if `form.ordered`, the channel that each stored channel is, [in] int32.
        used: Number of calls that each kernel served, by name.
        choices: Kernel that "auto" took for each number of rows, type, number of threads and
            device, and the seconds that it and others were measured to take, by name.
        derived: What kernels derive from the buffers once and keep, by a name of their choice.

    Raises:
        UserError: If there is no such kernel, or it cannot serve this layer.
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

    def __init__(self, form: Form, kernel: str = AUTO, layer_name: str = "") -> None:
        super().__init__()
        self.form = form
        self.in_features, self.out_features = form.in_features, form.out_features
        self.layer_name = layer_name
        self.layout: str | None = None
        self.used: Counter[str] = Counter()
        self.derived: dict[str, Any] = {}
        self.choices: dict[Asked, tuple[str, dict[str, float]]] = {}
        for name, (shape, dtype) in buffers(form).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype))
        if not form.bias:
            self.register_buffer("bias", None)
        self.kernel = kernel

    @classmethod
    @torch.no_grad()
    def from_quantized(cls, layer: QuantLinear, kernel: str = AUTO) -> "PackedLinear":
        """Packs a quantized linear, which is left unchanged.

        Raises:
            UserError: If a quantizer of the layer has no packed form, or the kernel cannot serve
                the layer. The message names the layer.
            RunError: If the weight differs from what its codes stand for.
        """
        form, numbers = pack_numbers(layer)
        packed = cls(form, AUTO, layer.layer_name)
        for name, value in numbers.items():
            setattr(packed, name, value)
        packed.kernel = kernel
        return packed

    @property
    def kernel(self) -> str:
        """The kernel that was asked for: a name, or "auto"."""
        return self._kernel

    @kernel.setter
    def kernel(self, kernel: str) -> None:
        if kernel != AUTO and (obstacle := kernel_named(kernel).obstacle(self)) is not None:
            choices = ", ".join((AUTO, *self.serving()))
            raise UserError(
                f"kernel={kernel!r} cannot serve {self._label()}: {obstacle}. "
                f"Choose one of: {choices}."
            )
        self._kernel = kernel

    def serving(self) -> list[str]:
        """Returns the names of the kernels that can serve this layer on its device."""
        return [kernel.name for kernel in kernels.serving(self)]

    def choose(self, rows: int, dtype: torch.dtype = torch.float32) -> str:
        """Returns the name of the kernel that is preferred for an input.

        Args:
            rows: Number of rows of the input.
            dtype: Type of the input. Kernels that round operands to bf16 are chosen only for
                models in bf16, which round them too. In a model in float64, a kernel that was asked
                for and does not sum in float64 leaves the layer to another.
        """
        return self._forced(dtype) or kernels.preferred(self, rows, dtype).name

    def _choose(self, rows: int, dtype: torch.dtype) -> str:
        """Returns the name of the kernel for an input that is there, measured where that helps."""
        if forced := self._forced(dtype):
            return forced
        codes = self._buffers["codes"]
        assert codes is not None
        asked = (rows, dtype, torch.get_num_threads(), codes.device)
        if asked not in self.choices:
            kernel, seconds = kernels.chosen(self, rows, dtype)
            self.choices[asked] = (kernel.name, seconds)
        return self.choices[asked][0]

    def _forced(self, dtype: torch.dtype) -> str | None:
        """The kernel that was asked for, if it serves inputs of this type."""
        asked = self.kernel
        return asked if asked != AUTO and fits_dtype(kernel_named(asked), self, dtype) else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in] to [..., out] in the dtype of `x`, without a gradient.

        Raises:
            UserError: If `x` has another number of positions than there are ranges for.
            RunError: If `x` holds NaN or infinity. While a CUDA graph is captured, nothing can be
                raised. The kernel `triton` makes the outputs of such a row NaN.
        """
        if torch.is_grad_enabled():  # entering `no_grad` takes a small layer a tenth of its time
            with torch.no_grad():
                return self.forward(x)
        if self.form.inputs == "position":
            require_positions(x, self.form.input_shape[0])
        rows = x.reshape(-1, self.in_features)
        kernel = self._choose(rows.shape[0], x.dtype)
        self.used[kernel] += 1
        bias = self._buffers["bias"]  # a module's attributes take ten times as long
        if bias is not None:
            bias = bias.view(torch.float32)
        y = kernel_named(kernel).linear(self, self.transformed(rows), bias)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def working_bytes(self, rows: int) -> int:
        """Estimates the bytes that a call needs at once, besides its input, on this machine.

        Args:
            rows: Number of rows of the input, in a model in bf16. A kernel that serves single rows
                is counted too, because it may leave the codes in a layout of its own.
        """
        chosen = {self.choose(count, torch.bfloat16) for count in (1, rows)}
        return max(kernel_named(name).working_bytes(self, rows) for name in chosen)

    def channels(self) -> Tensor:
        """Returns the channel that each stored channel is, [in] integers."""
        if self.form.ordered:
            return self.order
        return torch.arange(self.in_features, device=self.codes.device)

    def weight_codes(self) -> Tensor:
        """Returns the codes of the weight, [out, in] uint8."""
        return self.in_own_order(self.stored_codes())

    def input_steps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes an input [rows, in].

        Returns:
            Steps q - z, [rows, in] float32; scale and zero point z in float32, which broadcast to
            the steps. The scale is one where it is folded into the weight.
        """
        steps, scale, zero_point = self.stored_steps(self.transformed(x))
        return (
            self.in_own_order(steps),
            self.in_own_order(scale),
            self.in_own_order(zero_point),
        )

    def transformed(self, x: Tensor) -> Tensor:
        """Returns what the kernels read of an input [rows, in]: its transform, or itself."""
        if not self.form.hadamard:
            return x
        return hadamard_transform(x, passes=walsh_hadamard_on(x.device))

    def weight_scales(self) -> tuple[Tensor, Tensor]:
        """Returns scale and zero point of a uniform weight, both [out, groups] float32."""
        shape = (self.out_features, self.form.scale_shape[1])
        scale = self.scale.view(torch.float32).expand(shape)
        return scale, self.zero_point.float().expand(shape)

    def absmax(self) -> Tensor:
        """Returns the absmax of each block of a NormalFloat weight, [blocks] float32."""
        return dequantize_absmax(
            self.constant_codes if self.form.constants[0] else None,
            self.scale.view(torch.float32),
            self.mean.view(torch.float32),
            self.form.constant_block_size,
        )

    def dequantized(self, rows: slice | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns rows of the weight, [rows, in], equal to the simulated layer's.

        Args:
            rows: Rows of the weight; None stands for all.
            dtype: Float32 or float64, the type that the simulated layer computes in.
        """
        return self.in_own_order(float_weight(self, rows or slice(0, self.out_features), dtype))

    def as_stored(self, x: Tensor) -> Tensor:
        """Returns an input [rows, in] with its channels in the order of the codes."""
        return x.index_select(1, self.order) if self.form.ordered else x

    def stored_codes(self) -> Tensor:
        """Returns the codes of the weight with channels as they are stored, [out, in] uint8."""
        if self.layout is not None:
            return kernel_named(self.layout).from_layout(self.codes)
        return unpack(self.codes, self.form.weight_bits, self.in_features)

    def stored_steps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `input_steps` of an input [rows, in] with channels as they are stored."""
        x = self.as_stored(x).float()
        scale, zero_point = self.input_grid(x)
        steps = (x / scale).round_()
        torch.maximum(steps, -zero_point, out=steps)
        torch.minimum(steps, 2**self.form.input_bits - 1 - zero_point, out=steps)
        return steps, torch.ones_like(scale) if self.form.folds else scale, zero_point

    def input_grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns scale and zero point of an input [rows, in], with channels as they are stored.

        Both are float32 of one shape: [], [in], or [rows, 1] for scales of tokens, made in the call
        or stored by position, which do not depend on the order of the channels of `x`.
        """
        form = self.form
        if form.inputs != "token":
            scale, zero_point = self.input_scale.view(torch.float32), self.input_zero_point.float()
            if form.inputs == "static":
                return scale, zero_point
            position = torch.arange(len(x), device=x.device) % len(scale)
            return scale[position, None], zero_point[position, None]
        x = x.float()
        lo, hi = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        return affine_grid(lo * form.ratio, hi * form.ratio, form.input_bits)

    def input_sharing(self) -> str:
        """Returns which channels share the scale of the input.

        Folded scales count as shared. The result is found once there are numbers, and then kept.

        Returns:
            "all" channels, those of each weight "group", or "none".
        """
        form = self.form
        if form.inputs != "static" or form.folds or not form.input_shape:
            return "all"
        if self.input_scale.is_meta:
            return "group" if form.ordered else "none"
        if "input_sharing" not in self.derived:
            groups = self.input_scale.split(form.group_size)
            by_group = all(bool((group == group[0]).all()) for group in groups)
            alike = by_group and bool((self.input_scale == self.input_scale[0]).all())
            self.derived["input_sharing"] = "all" if alike else "group" if by_group else "none"
        return str(self.derived["input_sharing"])

    def has_integer_product(self) -> bool:
        """Whether the channels of each weight group share all scales.

        Then the sum over a group is an integer: steps of the input times steps of the weight.
        """
        return self.form.weight == "uniform" and self.input_sharing() != "none"

    def channel_scales(self) -> Tensor | None:
        """Returns the input scale of each stored channel, [in] float32.

        None stands for one scale for all channels, and for folded scales.
        """
        return None if self.input_sharing() == "all" else self.input_scale.view(torch.float32)

    def shares_input_scale(self, scale: Tensor) -> bool:
        """Whether all channels of a token share `scale`, which `stored_steps` returned."""
        return scale.numel() == 1 or self.form.inputs != "static"

    def use_layout(self, kernel: Kernel | None) -> None:
        """Brings `codes` into the layout of a kernel, or for None into that of checkpoints."""
        name = None if kernel is None else kernel.name
        if name == self.layout:
            return
        codes = self.stored_codes()
        bits = self.form.weight_bits
        self.codes = pack(codes, bits) if kernel is None else kernel.to_layout(codes)
        self.layout = name

    def extra_repr(self) -> str:
        form = self.form
        return (
            f"in_features={form.in_features}, out_features={form.out_features}, "
            f"weight={form.weight}{form.weight_bits}, inputs={form.inputs}{form.input_bits}"
        )

    def in_own_order(self, x: Tensor) -> Tensor:
        """Returns a tensor [..., in] of stored channels with channels in the order of inputs.

        A tensor whose last dimension is not that of channels is returned as it is.
        """
        if not self.form.ordered or not x.ndim or x.shape[-1] != self.in_features:
            return x
        return torch.empty_like(x).index_copy_(x.ndim - 1, self.order.long(), x)

    def _apply(self, *args: Any, **kwargs: Any) -> "PackedLinear":
        device = self.codes.device
        super()._apply(*args, **kwargs)
        if self.codes.device != device:
            self.kernel = self._kernel  # which may not run there, and would read other memory
        return self

    def _label(self) -> str:
        return self.layer_name or "a linear"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.use_layout(None)  # in which the new codes are
        self.derived = {}  # another one, by which kernels see that the buffers have new numbers
        super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.use_layout(None)
        super()._save_to_state_dict(*args, **kwargs)

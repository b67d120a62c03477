"""What every packed product has: the interface of a kernel, and the notation of their docstrings.

Let q be the code of a number, z its zero point and q - z its steps. With t the steps of an input
and v the steps of a uniform weight, a packed layer computes

    y = sum_k (t_k c_k) (v_k s_k) d + b

where c is the input's scale of a channel, s the weight's scale of a group of channels, d the
input's scale of a token (row), and b the bias. An input has scales of channels or of tokens, never
both; the other factor is one. A folded scale is part of the weight, so c is one for it too.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from qvlm.errors import RunError

if TYPE_CHECKING:
    from qvlm.packing.layer import PackedLinear


class Kernel(ABC):
    """A way to multiply an input with a packed weight.

    A kernel has no state: it reads the buffers of the layer that it is given. Channels lie in a
    layer as they are stored, not in the order of the input; `PackedLinear` says how to convert.

    Attributes:
        name: Value of the option `kernel` that forces this kernel, and its name in records.
        can_sum_in_float64: Whether it sums unrounded products in float64 for inputs in float64. In
            a model in float64 only such kernels run, so that all of them give the same answers.
    """

    name: ClassVar[str]
    can_sum_in_float64: ClassVar[bool] = False

    @abstractmethod
    def obstacle(self, layer: PackedLinear) -> str | None:
        """Returns why this kernel cannot serve a layer on the device that holds it, or None.

        A layer on the meta device is treated as one on the CPU.
        """

    def is_preferred(self, layer: PackedLinear, rows: int, dtype: torch.dtype) -> bool:
        """Whether `kernel=auto` takes this kernel, given that it takes none of those listed before.

        Args:
            layer: Layer to serve, for which there may be an obstacle.
            rows: Number of rows of the input.
            dtype: Type of the input, which is that of the model.
        """
        return self.obstacle(layer) is None

    def sums_in_float64(self, layer: PackedLinear) -> bool:
        """Whether it does so for this layer; see `can_sum_in_float64`."""
        return self.can_sum_in_float64

    def is_exact(self, layer: PackedLinear, dtype: torch.dtype) -> bool:
        """Whether the output of a layer that this kernel serves is its exact sum, rounded once.

        Such kernels give the same answers, and `kernel=auto` takes the fastest of them.
        """
        return False

    @abstractmethod
    def product(self, layer: PackedLinear, x: Tensor) -> Tensor:
        """Multiplies an input with the weight, transposed, and leaves the bias out.

        Args:
            layer: Layer without an obstacle.
            x: Finite input in any floating-point type, [rows, in].

        Returns:
            Output in float32 or float64, [rows, out].
        """

    def linear(self, layer: PackedLinear, x: Tensor, bias: Tensor | None) -> Tensor:
        """Computes `product` plus the bias, [out] float32, of an input that need not be finite.

        Returns:
            Output of any floating-point type, [rows, out].

        Raises:
            RunError: If `x` holds NaN or infinity.
        """
        require_finite(layer, x)
        y = self.product(layer, x)
        return y if bias is None else y.add_(bias)

    @abstractmethod
    def working_bytes(self, layer: PackedLinear, rows: int) -> int:
        """Estimates the bytes that a call needs at once, besides its input, in a bf16 model."""

    def extra_error(self, layer: PackedLinear, x: Tensor, magnitude: Tensor) -> Tensor | float:
        """Bounds what this kernel rounds off beyond the float32 sums of `bounds`.

        Args:
            layer: Layer that the kernel serves.
            x: Input, [rows, in].
            magnitude: Sums of absolute values |x_hat| |w_hat|^T + |b|, [rows, out] float64.

        Returns:
            Largest additional difference to the simulated output, which broadcasts to [rows, out].
        """
        return 0.0

    def to_layout(self, codes: Tensor) -> Tensor:
        """Packs codes [out, in] into the layout that this kernel reads, if it has one of its own.

        `PackedLinear.use_layout` calls it. Kernels that read the layout of checkpoints, as
        `formats` describes it, need not implement it.
        """
        raise NotImplementedError(f"kernel {self.name} has no layout of its own")

    def from_layout(self, packed: Tensor) -> Tensor:
        """Returns the codes [out, in] uint8 that `to_layout` packed."""
        raise NotImplementedError(f"kernel {self.name} has no layout of its own")


def require_finite(layer: PackedLinear, x: Tensor) -> None:
    """Refuses an input with NaN or infinity. While a CUDA graph is captured, nothing can be read.

    Raises:
        RunError: If there is such a number.
    """
    if not (x.is_cuda and torch.cuda.is_current_stream_capturing()) and not _is_finite(x):
        raise not_finite(layer)


def not_finite(layer: PackedLinear) -> RunError:
    """Returns the error for an input with NaN or infinity."""
    return RunError(f"The input of {layer.layer_name or 'a linear'} is not finite.")


def _is_finite(x: Tensor) -> bool:
    """Whether all numbers are finite. Their sum, which takes one pass, nearly always tells."""
    if math.isfinite(x.sum(dtype=torch.float32).item()):
        return True
    return bool(torch.isfinite(x).all())

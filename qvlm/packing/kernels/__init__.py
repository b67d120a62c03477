"""Kernels: the products that packed layers compute with, one file each.

Start with `base.py`, which says what a kernel is. To add one, write its file and put the object
into `KERNELS` here; nothing else lists kernels. The files that begin with `native_` or `triton_`
hold the compiled code of two kernels. `measured.py` times kernels that give the same answers.
`float_weight.py` and `rounding.py` hold what kernels share, and `bounds.py` derives their error
bounds. Kernels import
`formats` and `absmax` of packing. They are called by the layer and never import it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qvlm.errors import UserError
from qvlm.packing.kernels.base import Kernel
from qvlm.packing.kernels.bf16 import BF16
from qvlm.packing.kernels.int4_weight_only import INT4_WEIGHT_ONLY
from qvlm.packing.kernels.int_mm import INT_MM
from qvlm.packing.kernels.measured import fastest
from qvlm.packing.kernels.native import NATIVE
from qvlm.packing.kernels.reference import REFERENCE
from qvlm.packing.kernels.triton import TRITON

if TYPE_CHECKING:
    from qvlm.packing.layer import PackedLinear

# All kernels, in the order in which `kernel=auto` asks whether they are preferred. The last one
# serves every layer.
KERNELS: tuple[Kernel, ...] = (NATIVE, TRITON, INT4_WEIGHT_ONLY, INT_MM, BF16, REFERENCE)
AUTO = "auto"


def names() -> tuple[str, ...]:
    """Returns the values that the option `kernel` accepts: "auto" and the name of every kernel."""
    return (AUTO, *(kernel.name for kernel in KERNELS))


def kernel_named(name: str) -> Kernel:
    """Returns the kernel of a name other than "auto".

    Raises:
        UserError: If there is no such kernel.
    """
    for kernel in KERNELS:
        if kernel.name == name:
            return kernel
    raise UserError(f"kernel={name!r} is not a kernel. Choose one of: {', '.join(names())}.")


def serving(layer: PackedLinear) -> list[Kernel]:
    """Returns the kernels that can serve a layer on its device, in the order of `KERNELS`."""
    return [kernel for kernel in KERNELS if kernel.obstacle(layer) is None]


def preferred(layer: PackedLinear, rows: int, dtype: torch.dtype) -> Kernel:
    """Returns the kernel that is preferred for an input before anything is measured.

    Args:
        layer: Layer to serve.
        rows: Number of rows of the input.
        dtype: Type of the input.
    """
    return next(
        kernel
        for kernel in KERNELS
        if fits_dtype(kernel, layer, dtype) and kernel.is_preferred(layer, rows, dtype)
    )


def fits_dtype(kernel: Kernel, layer: PackedLinear, dtype: torch.dtype) -> bool:
    """Whether a kernel's sums are as precise as inputs of type `dtype` ask for."""
    return dtype != torch.float64 or kernel.sums_in_float64(layer)


def chosen(layer: PackedLinear, rows: int, dtype: torch.dtype) -> tuple[Kernel, dict[str, float]]:
    """Returns the kernel that `kernel=auto` takes for an input, see `measured`.

    Args:
        layer: Layer to serve.
        rows: Number of rows of the input.
        dtype: Type of the input.

    Returns:
        Kernel, and the seconds that it and others take by name, if they were measured.
    """
    kernel = preferred(layer, rows, dtype)
    if layer.codes.device.type != "cpu":
        return kernel, {}
    rivals = [kernel]
    if kernel.is_exact(layer, dtype):
        rivals += [
            rival
            for rival in serving(layer)
            if rival != kernel and rival.is_exact(layer, dtype) and fits_dtype(rival, layer, dtype)
        ]
    return fastest(layer, rivals, rows, dtype)


__all__ = [
    "AUTO",
    "KERNELS",
    "Kernel",
    "chosen",
    "fits_dtype",
    "kernel_named",
    "names",
    "preferred",
    "serving",
]

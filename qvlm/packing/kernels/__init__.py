"""Kernels: the products that packed layers compute with, one file each.

Start with `base.py`, which says what a kernel is. To add one, write its file and put the object
into `KERNELS` here; nothing else lists kernels. `native_library.py` with `native.c`, and
`triton_kernels.py`, hold the compiled code of two kernels. `float_weight.py` and `rounding.py` hold
what kernels share, and `bounds.py` derives their error bounds. Kernels import `formats` and
`absmax` of packing. They are called by the layer and never import it.
"""

from qvlm.packing.kernels.base import Kernel
from qvlm.packing.kernels.bf16 import BF16
from qvlm.packing.kernels.int4_weight_only import INT4_WEIGHT_ONLY
from qvlm.packing.kernels.int_mm import INT_MM
from qvlm.packing.kernels.native import NATIVE
from qvlm.packing.kernels.reference import REFERENCE
from qvlm.packing.kernels.triton import TRITON

# All kernels, in the order in which `kernel=auto` asks them whether they are preferred. The last
# one serves every layer.
KERNELS: tuple[Kernel, ...] = (NATIVE, TRITON, INT4_WEIGHT_ONLY, INT_MM, BF16, REFERENCE)
AUTO = "auto"

_BY_NAME = {kernel.name: kernel for kernel in KERNELS}


def names() -> tuple[str, ...]:
    """Returns the values that the option `kernel` accepts: "auto" and the name of every kernel."""
    return (AUTO, *_BY_NAME)


def kernel_named(name: str) -> Kernel:
    """Returns the kernel of a name other than "auto".

    Raises:
        KeyError: If there is no such kernel.
    """
    return _BY_NAME[name]


__all__ = ["AUTO", "KERNELS", "Kernel", "kernel_named", "names"]

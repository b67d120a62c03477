"""Packed models: layers that store codes in as many bits as they have, and multiply these codes.

Start with `layer.py` (one packed linear) and `form.py` (what it stores, in the formats of
`formats.py` and `absmax.py`). `kernels/` holds the products that a layer chooses from. `model.py`
packs a whole model, `verification.py` proves its bits, `checkpoint.py` saves and loads it,
`partial.py` writes a checkpoint block by block, and `uncalibrated.py` packs without calibration
for measurements. `decoder/` decodes a packed LLaMA on a GPU in CUDA graphs. Files here may import
`quantization`, `errors` and the writer of files.
"""

from qvlm.packing.checkpoint import (
    ORIGIN,
    is_packed,
    load_packed,
    read_origin,
    save_packed,
    write_origin,
)
from qvlm.packing.form import Form
from qvlm.packing.kernels import KERNELS, Kernel, kernel_named
from qvlm.packing.kernels.bounds import accumulation_bound
from qvlm.packing.layer import PackedLinear
from qvlm.packing.model import (
    force_kernel,
    kernels_used,
    pack_model,
    packed_layers,
    weight_bytes,
)
from qvlm.packing.partial import PartialCheckpoint
from qvlm.packing.verification import measure_packed_bits

__all__ = [
    "KERNELS",
    "ORIGIN",
    "Form",
    "Kernel",
    "PackedLinear",
    "PartialCheckpoint",
    "accumulation_bound",
    "force_kernel",
    "is_packed",
    "kernel_named",
    "kernels_used",
    "load_packed",
    "measure_packed_bits",
    "pack_model",
    "packed_layers",
    "read_origin",
    "save_packed",
    "weight_bytes",
    "write_origin",
]

"""Packed models: layers that store codes in as many bits as they have, and multiply these codes.

Start with `layer.py` (one packed linear) and `form.py` (what it stores, in the formats of
`formats.py` and `absmax.py`). `kernels/` holds the products that a layer chooses from. `model.py`
packs a whole model, `verification.py` proves its bits, `checkpoint.py` saves and loads it, and
`origin.py` says how it was made. `saving.py` says where a checkpoint is written, `partial.py`
writes one block by block, and `uncalibrated.py` packs without calibration for measurements.
`decoder/` decodes a packed LLaMA on a GPU in CUDA graphs. Files here may import `quantization`,
`errors`, `validation`, and the files of `records` that write and read.
"""

from qvlm.packing.checkpoint import is_packed, load_packed, save_packed
from qvlm.packing.form import Form
from qvlm.packing.kernels import KERNELS, Kernel, kernel_named
from qvlm.packing.kernels.bounds import accumulation_bound
from qvlm.packing.layer import PackedLinear
from qvlm.packing.model import (
    force_kernel,
    kernel_choices,
    kernels_used,
    pack_model,
    packed_layers,
    weight_bytes,
)
from qvlm.packing.origin import ORIGIN, Encoding, Origin, read_origin, write_origin
from qvlm.packing.partial import PartialCheckpoint
from qvlm.packing.saving import partial_folder, require_own, resolve_folder, save_folder
from qvlm.packing.verification import measure_packed_bits, refutation

__all__ = [
    "KERNELS",
    "ORIGIN",
    "Encoding",
    "Form",
    "Kernel",
    "Origin",
    "PackedLinear",
    "PartialCheckpoint",
    "accumulation_bound",
    "force_kernel",
    "is_packed",
    "kernel_choices",
    "kernel_named",
    "kernels_used",
    "load_packed",
    "measure_packed_bits",
    "pack_model",
    "packed_layers",
    "partial_folder",
    "read_origin",
    "refutation",
    "require_own",
    "resolve_folder",
    "save_folder",
    "save_packed",
    "weight_bytes",
    "write_origin",
]

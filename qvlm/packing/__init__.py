"""Packed layers: codes in as many bits as they need, and products that take them as they are."""

from qvlm.packing.layer import KERNELS, Form, PackedLinear, accumulation_bound
from qvlm.packing.model import kernels_used, pack_model, packed_layers, weight_bytes

__all__ = [
    "KERNELS",
    "Form",
    "PackedLinear",
    "accumulation_bound",
    "kernels_used",
    "pack_model",
    "packed_layers",
    "weight_bytes",
]

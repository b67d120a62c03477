"""Quantization methods, a file each; `base.py` says how to write one."""

from qvlm.methods.base import Method, MethodReport
from qvlm.methods.full_precision import FullPrecision
from qvlm.methods.rtn import RTN

__all__ = ["RTN", "FullPrecision", "Method", "MethodReport"]

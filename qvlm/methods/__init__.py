"""Quantization methods, one file or folder each; open `base.py` first, which says how to write one.

`rtn.py` is the control and the shortest example. `layerwise.py`, `qlora.py`, `zeroquant.py`, `awq/`
and `qvlm/` are the methods of the tables, and `full_precision.py` is their first row. A method may
import `qvlm.quantization` and knows nothing of Hydra, records or tables.
"""

from qvlm.methods.base import Method, MethodReport
from qvlm.methods.full_precision import FullPrecision
from qvlm.methods.rtn import RTN

__all__ = ["RTN", "FullPrecision", "Method", "MethodReport"]

"""AWQ, activation-aware weight quantization (arXiv 2306.00978).

`method.py` puts the parts together and is the file to open first. `rescaling.py` finds the channels
of a block that can be scaled, `search.py` chooses their scales (eq. 4 and 5), and `clipping.py`
clips the ranges of the weights.
"""

from qvlm.methods.awq.method import AWQ

__all__ = ["AWQ"]

"""GPTQ, rounding with compensation (arXiv 2210.17323).

`rounding.py` rounds one weight (the paper's algorithm), `samples.py` collects what the linears of a
block read, and `method.py` goes over the blocks. Rotated methods use the same parts.
"""

from qvlm.methods.gptq.method import GPTQ

__all__ = ["GPTQ"]

"""AWQ: activation-aware weight quantization (arXiv 2306.00978)."""

from qvlm.methods.awq.method import AWQ

__all__ = ["AWQ"]

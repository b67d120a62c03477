"""Q-VLM (arXiv 2410.08119), a file per part of the paper; `method.py` puts them together."""

from qvlm.methods.qvlm.method import QVLM

__all__ = ["QVLM"]

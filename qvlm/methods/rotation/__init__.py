"""Rotations that a language model absorbs without a change of what it computes.

`stream.py` rotates the residual stream and `layer.py` what one decoder layer reads and writes.
`method.py` is QuaRot, which rotates and then rounds.
"""

from qvlm.methods.rotation.method import QuaRot

__all__ = ["QuaRot"]

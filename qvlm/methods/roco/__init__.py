"""RoCo, rotation and confident compensation: the method of this project.

`method.py` puts the parts together and is the file to open first. `confidence.py` weighs the
calibration tokens. The rotation is that of `qvlm.methods.rotation`, the rounding that of
`qvlm.methods.gptq`. docs/method.md explains the method and says what each part brings.
"""

from qvlm.methods.roco.method import RoCo

__all__ = ["RoCo"]

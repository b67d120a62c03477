"""RTN, round to nearest: the shared quantizer and nothing else.

RTN is the control that every other method has to beat. Weights and activations are rounded with the
ranges that all methods start from (the MSE estimator's), each linear on its own, without a search.
"""

from qvlm.methods.base import MethodReport
from qvlm.quantization.calibration import Walk


class RTN:
    """Round to nearest with the default ranges."""

    name = "RTN"

    def quantize(self, walk: Walk) -> MethodReport:
        """Replaces every linear, with ranges from what it reads in the model quantized so far.

        Returns:
            A report whose details name the layers that saw no calibration token.
        """
        for block in walk.blocks():
            for name, samples in block.linear_inputs().items():
                block.replace(name, block.quantize_linear(name, samples))
        return MethodReport(details={"uncalibrated": list(walk.uncalibrated)})

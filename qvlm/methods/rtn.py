"""RTN, round to nearest: the shared quantizer and nothing else.

The control that every other method has to beat: weights and activations are rounded with the
lp-minimal ranges that all methods start from, each linear on its own, without any search.
"""

from qvlm.methods.base import MethodReport
from qvlm.quantization.calibration import Walk


class RTN:
    """Round to nearest with the default ranges."""

    name = "RTN"

    def quantize(self, walk: Walk) -> MethodReport:
        """Replaces every linear; ranges come from the inputs that the quantized model so far sees.

        Returns:
            A report whose details name the layers that saw no calibration token.
        """
        for block in walk.blocks():
            for name, samples in block.linear_inputs().items():
                block.replace(name, block.quantize_linear(name, samples))
        return MethodReport(details={"uncalibrated": list(walk.uncalibrated)})

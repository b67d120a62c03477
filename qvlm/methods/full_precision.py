"""Full precision: the model as it is. The row that every table starts with."""

from qvlm.methods.base import MethodReport
from qvlm.quantization.calibration import Walk


class FullPrecision:
    """Quantizes nothing."""

    name = "FP"

    def quantize(self, walk: Walk) -> MethodReport:
        """Leaves the walk's model as it is."""
        return MethodReport()

"""The QLoRA baseline: NormalFloat weights (arXiv 2305.14314, section 3), without the adapters.

Q-VLM's Table 1 and 2 start from it. Weights are NormalFloats of the cell's bits with double
quantization, activations go through the shared quantizer with its layer-wise lp-minimal ranges,
and nothing is trained.

NormalFloat blocks run along the flattened weight, as in QLoRA's own code, so the group size of the
shared weight quantizer does not count here.
"""

from torch import Tensor

from qvlm.errors import UserError
from qvlm.methods.base import MethodReport
from qvlm.quantization.calibration import Walk
from qvlm.quantization.normal_float import NormalFloatQuantizer


class QLoRA:
    """NormalFloat weights.

    Args:
        block_size: weights that share a constant.
        double_quantization: whether constants are quantized to 8 bits (QLoRA, eq. 6).
        constant_block_size: constants that share a scale then.

    Raises:
        UserError: if a size is not a whole number above 0, or the switch is no switch.
    """

    name = "QLoRA"

    def __init__(
        self,
        block_size: int = 64,
        double_quantization: bool = True,
        constant_block_size: int = 256,
    ) -> None:
        for option, size in (
            ("block_size", block_size),
            ("constant_block_size", constant_block_size),
        ):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise UserError(f"method.{option}={size!r}: accepted are whole numbers from 1")
        if not isinstance(double_quantization, bool):
            raise UserError(
                f"method.double_quantization={double_quantization!r}: accepted are true and false"
            )
        self.block_size = block_size
        self.constant_block_size = constant_block_size if double_quantization else None

    def quantize(self, walk: Walk) -> MethodReport:
        """Replaces every linear; there is no search.

        Returns:
            A report whose details name the layers that saw no calibration token.
        """
        for block in walk.blocks():
            for name, samples in block.linear_inputs().items():
                bits = block.spec(name)[0].bits

                def normal_float(weight: Tensor, bits: int = bits) -> NormalFloatQuantizer:
                    return NormalFloatQuantizer.fit(
                        weight, bits, self.block_size, self.constant_block_size
                    )

                block.replace(name, block.quantize_linear(name, samples, weights=normal_float))
        return MethodReport(details={"uncalibrated": list(walk.uncalibrated)})

"""The QLoRA baseline: NormalFloat weights (arXiv 2305.14314, section 3), without the adapters.

Tables 1 and 2 of Q-VLM start from this baseline. Weights are NormalFloats of the cell's bits with
double quantization. Activations go through the quantizer that all methods share, each layer with
its own range. Nothing is trained.

NormalFloat blocks run along the flattened weight, as in QLoRA's own code, so the group size of the
shared weight quantizer has no effect here.
"""

from collections.abc import Callable

from torch import Tensor

from qvlm import validation
from qvlm.methods.base import MethodReport
from qvlm.quantization.calibration import Walk
from qvlm.quantization.normal_float import NormalFloatQuantizer


class QLoRA:
    """NormalFloat weights and the shared activation quantizer.

    Args:
        block_size: Number of weights that share an absmax.
        double_quantization: Whether the absmax is quantized to 8 bits (QLoRA, eq. 6).
        constant_block_size: Number of absmax values that share an 8-bit scale.

    Raises:
        UserError: If a size is not a whole number above 0, or the switch is not a boolean.
    """

    name = "QLoRA"

    def __init__(
        self,
        block_size: int = 64,
        double_quantization: bool = True,
        constant_block_size: int = 256,
    ) -> None:
        validation.whole_number("method.block_size", block_size)
        validation.whole_number("method.constant_block_size", constant_block_size)
        validation.switch("method.double_quantization", double_quantization)
        self.block_size = block_size
        self.nested_block_size = constant_block_size if double_quantization else None

    def quantize(self, walk: Walk) -> MethodReport:
        """Replaces every linear of the walk's model; there is no search.

        Returns:
            A report whose details name the layers that saw no calibration token.
        """
        for block in walk.blocks():
            for name, samples in block.linear_inputs().items():
                bits = block.spec(name)[0].bits
                weights = normal_float(bits, self.block_size, self.nested_block_size)
                block.replace(name, block.quantize_linear(name, samples, weights=weights))
        return MethodReport(details={"uncalibrated": list(walk.uncalibrated)})


def normal_float(
    bits: int, block_size: int = 64, nested_block_size: int | None = 256
) -> Callable[[Tensor], NormalFloatQuantizer]:
    """The function from a weight [out, in] to its NormalFloat quantizer.

    Args:
        bits: Number of bits, 2 to 8.
        block_size: Number of weights that share an absmax.
        nested_block_size: Number of absmax values that share an 8-bit scale; None keeps them float.
    """
    return lambda weight: NormalFloatQuantizer.from_weight(
        weight, bits, block_size, nested_block_size
    )

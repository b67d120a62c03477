"""A baseline in the manner of ZeroQuant-V2 (arXiv 2303.08302): every activation per token.

ZeroQuant-V2 pairs fine-grained weight quantization with asymmetric activation scales that each
token computes for itself. So does this: weights as the cell's weight quantizer has them (in
groups), activations of the whole model dynamic per token, each layer on its own. Q-VLM compares
with it in Table 6. Its ranges are the lp-minimal ones that all methods here start from; for a token
that is one calibrated ratio per layer.

Left out: the low-rank compensation of the weight error (LoRC), which the paper offers on top.
"""

from dataclasses import replace

from qvlm.methods.base import MethodReport
from qvlm.methods.rtn import RTN
from qvlm.quantization.calibration import Walk


class ZeroQuant:
    """Group-wise weights and per-token activations, rounded to nearest."""

    name = "ZeroQuant-V2, per token"

    def quantize(self, walk: Walk) -> MethodReport:
        """Rounds every linear with all activations per token; there is no search.

        Returns:
            A report whose details name the layers that saw no calibration token.
        """
        shared = walk.quantization
        walk.quantization = replace(
            shared,
            language=replace(shared.language, granularity="per_token"),
            vision=replace(shared.vision, granularity="per_token"),
        )
        try:
            return RTN().quantize(walk)
        finally:
            walk.quantization = shared

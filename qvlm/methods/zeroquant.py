"""A baseline in the manner of ZeroQuant-V2 (arXiv 2303.08302): every activation per token.

ZeroQuant-V2 combines fine-grained weight quantization with asymmetric activation scales that are
computed per token. So does this baseline, each layer on its own: weights have the groups of the
cell's weight quantizer, and activations of the whole model are dynamic per token. Q-VLM compares
with ZeroQuant-V2 in its Table 6. Ranges come from the estimator that all methods here start from,
which yields one calibrated ratio per layer for tokens.

Not here: the low-rank compensation of the weight error (LoRC), which the paper adds.
"""

from dataclasses import replace

from qvlm.methods.base import MethodReport
from qvlm.methods.rtn import RTN
from qvlm.quantization.calibration import Walk


class ZeroQuant:
    """Group-wise weights and per-token activations, rounded to nearest."""

    name = "ZeroQuant-V2, per token"

    def quantize(self, walk: Walk) -> MethodReport:
        """Rounds every linear, with all activations per token; there is no search.

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

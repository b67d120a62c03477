"""SmoothQuant (arXiv 2211.10438): difficulty moved from activations to weights.

Activations have channels with large values and weights have not. A channel j of an activation is
divided by s_j and the column of every weight that reads it multiplied by s_j (eq. 3 and 4):

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

s is folded into the norm or linear that produces the channels, so nothing remains at run time.
Which channels can be rescaled is found as for AWQ (`awq/rescaling.py`), which includes the channels
behind linears; the paper rescales those behind norms. The paper gives one alpha for a model, 0.5
for most. Here each block searches its own by the error of its quantized output, unless one is
given. No scaling at all is the first candidate of the search, so that no block has a larger error
than with RTN.
"""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qvlm import validation
from qvlm.methods.awq.rescaling import Rescaling, find_rescalings
from qvlm.methods.base import MethodReport
from qvlm.methods.objective import mean_squared_error
from qvlm.quantization.block import Block
from qvlm.quantization.calibration import Walk
from qvlm.quantization.precision import settled

# The released code's lower bound of maxima, so that a silent channel gets no extreme scale.
_LEAST = 1e-5


class SmoothQuant:
    """Activations and weights rescaled channel by channel, then rounded to nearest.

    Args:
        alpha: Exponent of the scale, from 0 to 1; None searches one for each block.
        n_grid: Number of values of alpha from 0 to 1 that a search tries.

    Raises:
        UserError: If an option has a value that is not accepted; the message names both.
    """

    def __init__(self, alpha: float | None = None, n_grid: int = 11) -> None:
        validation.whole_number("method.n_grid", n_grid, least=2)
        if alpha is not None:
            validation.number("method.alpha", alpha, 0, 1)
        self.alphas: list[float | None] = [alpha]
        if alpha is None:
            self.alphas = [None, *(step / (n_grid - 1) for step in range(n_grid))]
        self.name = "SmoothQuant" if alpha is None else f"SmoothQuant (alpha {alpha:g})"

    def quantize(self, walk: Walk) -> MethodReport:
        """Rescales and replaces every linear, block after block.

        Returns:
            A report. For each block its details state alpha (None for no scaling), the mean squared
            error of the block's quantized output, and the linears that are not rescaled.
        """
        begun = time.process_time()
        blocks = [self.quantize_block(block) for block in walk.blocks()]
        details = {"blocks": blocks, "uncalibrated": list(walk.uncalibrated)}
        candidates = sum(entry.pop("candidates") for entry in blocks)
        return MethodReport(time.process_time() - begun, candidates, details)

    def quantize_block(self, block: Block) -> dict[str, Any]:
        """Replaces the linears of a block and returns the block's entry in the report."""
        samples = block.linear_inputs()
        rescalings = [
            rescaling
            for rescaling in find_rescalings(block)
            if any(len(samples[name]) for name in rescaling.readers)
        ]
        entry: dict[str, Any] = {"block": block.name, "alpha": None, "error": None, "candidates": 0}
        scaled = {name for rescaling in rescalings for name in rescaling.readers}
        entry["unscaled"] = [name for name in block.linears if name not in scaled]
        if not block.inputs:  # nothing to search with
            _replace(block, samples, {})
            return entry
        target = block.float_outputs()
        before = {key: value.clone() for key, value in block.module.state_dict().items()}
        tried: list[tuple[float, float | None]] = []
        for alpha in self.alphas:
            self._apply(block, rescalings, samples, alpha)
            tried.append((mean_squared_error(block.run(), target), alpha))
            for name in block.linears:
                block.restore(name)
            block.module.load_state_dict(before)
        error, alpha = min(tried, key=lambda candidate: candidate[0])
        self._apply(block, rescalings, samples, alpha)
        return entry | {"alpha": alpha, "error": error, "candidates": len(tried)}

    def _apply(
        self,
        block: Block,
        rescalings: list[Rescaling],
        samples: Mapping[str, Tensor],
        alpha: float | None,
    ) -> None:
        """Rescales the float block by an alpha, and replaces its linears."""
        scales: dict[str, Tensor] = {}
        if alpha is not None:
            chosen = [smoothing_scale(block, each, samples, alpha) for each in rescalings]
            for rescaling, scale in zip(rescalings, chosen, strict=True):
                rescaling.apply(block.module, scale)
                scales |= dict.fromkeys(rescaling.readers, scale)
        _replace(block, samples, scales)


@torch.no_grad()
def smoothing_scale(
    block: Block, rescaling: Rescaling, samples: Mapping[str, Tensor], alpha: float
) -> Tensor:
    """Computes s of eq. 4 for the channels of a rescaling, [rescaling.width] float32.

    Args:
        block: Block whose linears are in floating point.
        rescaling: Channels to be scaled.
        samples: What each linear of the block reads, [tokens, in].
        alpha: Exponent, from 0 to 1.
    """
    seen = torch.cat([samples[name] for name in rescaling.readers])
    weights = torch.cat([block.linears[name].weight for name in rescaling.readers])
    inputs = settled(seen.abs().amax(0)).double().clamp_min(_LEAST)
    columns = settled(weights.abs().amax(0)).double().clamp_min(_LEAST)
    return settled((inputs.pow(alpha) / columns.pow(1 - alpha)).clamp_min(_LEAST))


def _replace(block: Block, samples: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> None:
    """Replaces the linears of a block, given the scale that each one's input was divided by."""
    for name, x in samples.items():
        scale = scales.get(name)
        layer = block.quantize_linear(name, x if scale is None else x / scale)
        block.replace(name, layer)

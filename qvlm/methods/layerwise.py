"""Layer-wise search: the control of Q-VLM, the same search with one layer in every segment.

Each layer's clipping percentile is chosen on its own, in the order of the data. The gain of Q-VLM
over this method is the gain of joint search; the gain of this method over RTN is that of searching
ranges at all.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from qvlm.methods.base import MethodReport
from qvlm.methods.qvlm.search import search_block, unsearched
from qvlm.methods.qvlm.search_options import PERCENTILES, SearchOptions, with_weights
from qvlm.quantization import Walk


class LayerWise:
    """Chooses the clipping percentile of every linear on its own.

    Args:
        percentiles, normalise, output, clip, clip_weights, search_tokens, weights: See
            `SearchOptions`. As a control, this method needs the values of the Q-VLM run that it is
            compared with.

    Raises:
        UserError: If an option has a value that is not accepted; the message names both.
    """

    def __init__(
        self,
        percentiles: Sequence[float] = PERCENTILES,
        normalise: bool = True,
        output: str = "layer",
        clip: str = "percentile",
        clip_weights: bool = True,
        search_tokens: int = 4096,
        weights: str = "uniform",
    ) -> None:
        self.search_options = SearchOptions(
            percentiles, normalise, output, clip, clip_weights, search_tokens, weights
        )
        self.name = with_weights("Layer-wise", weights)

    def quantize(self, walk: Walk) -> MethodReport:
        """Quantizes the walk's model in place; the details state the result of each layer."""
        begun = time.process_time()
        blocks: list[dict[str, Any]] = []
        without_data: list[str] = []
        for block in walk.blocks():
            found = search_block(block, [[[name]] for name in block.linears], self.search_options)
            blocks += [{"block": block.name, **asdict(result)} for result in found]
            without_data += unsearched(block, found)
        return MethodReport(
            search_seconds=time.process_time() - begun,
            candidates=sum(result["candidates"] for result in blocks),
            details={
                "blocks": blocks,
                "uncalibrated": list(walk.uncalibrated),
                "unsearched": without_data,
            },
        )

"""Layer-wise search: Q-VLM's control, the same search with one layer in every block.

Each layer's clipping percentile is chosen on its own, in the order of the data. What Q-VLM gains
over this, it gains by searching jointly; what this gains over RTN, any search of ranges would.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict

from qvlm.methods.base import MethodReport
from qvlm.methods.qvlm.search import search_block
from qvlm.methods.qvlm.trial import PERCENTILES, Search
from qvlm.quantization import Walk


class LayerWise:
    """Chooses the clipping percentile of every linear on its own.

    Args:
        percentiles, normalise, output, clip, clip_weights, search_tokens: see `Search`; to be a
            control they have to be those of the Q-VLM run that it is compared with.
    """

    name = "Layer-wise"

    def __init__(
        self,
        percentiles: Sequence[float] = PERCENTILES,
        normalise: bool = True,
        output: str = "layer",
        clip: str = "percentile",
        clip_weights: bool = True,
        search_tokens: int = 4096,
    ) -> None:
        self.search = Search(percentiles, normalise, output, clip, clip_weights, search_tokens)

    def quantize(self, walk: Walk) -> MethodReport:
        """Quantizes the walk's model in place; the details say what was found for each layer."""
        begun = time.perf_counter()
        found = [
            {"block": block.name, **asdict(result)}
            for block in walk.blocks()
            for result in search_block(block, [[[name]] for name in block.linears], self.search)
        ]
        return MethodReport(
            search_seconds=time.perf_counter() - begun,
            candidates=sum(result["candidates"] for result in found),
            details={"blocks": found, "uncalibrated": list(walk.uncalibrated)},
        )

"""Q-VLM: dependency mining, joint search of dependent layers, visual encoder optimization.

arXiv 2410.08119. The order is the paper's: optimize the visual encoder (`vision.py`), mine the
dependencies of the resulting model (`dependency.py`), group layers into segments (`partition.py`),
search segment after segment (`search.py`).

The walk determines what is quantized, and with which specs. Each part can be switched off. Without
`cdm` every layer is a segment of its own, without `veo` the tower stays as it is, and without both
this is the layer-wise search that the paper compares with.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from qvlm import validation
from qvlm.errors import UserError
from qvlm.methods.base import MethodReport
from qvlm.methods.qvlm.dependency import JOINTS, entropy, mine, quantization_error
from qvlm.methods.qvlm.partition import check_depth, check_threshold, mean_dependency, partition
from qvlm.methods.qvlm.search import search_block, unsearched
from qvlm.methods.qvlm.search_options import PERCENTILES, SearchOptions, with_weights
from qvlm.methods.qvlm.simulation import (
    freeze,
    language_layers,
    simulate,
    tower_layers,
    unwind,
)
from qvlm.methods.qvlm.vision import fine_tune, with_images
from qvlm.methods.qvlm.vision_loss import Tuning, reference
from qvlm.quantization import Block, Walk

GRANULARITIES = ("linear", "layer")
PROXIES = ("entropy", "quantization_error")
ORDERS = ("before", "after")
OBSERVED = {"vision": tower_layers, "language": language_layers}


class QVLM:
    """Q-VLM, whole or in part.

    Args:
        cdm: Whether dependencies are mined and dependent layers are searched jointly.
        veo: Whether the visual encoder is optimized.
        max_depth: Largest number of layers of a segment.
        granularity: Unit that counts as a layer: "linear", the linears of a decoder layer in the
            order of the data, or "layer", a whole decoder layer, whose linears share a percentile.
        h0: Threshold of the dependency per step in a segment, in nats. None takes the mean, for
            vision and language separately.
        proxy: Measure of a dependency: "entropy", or "quantization_error" for comparison (Table 5).
        pairing: Pairing of activations for the entropy: "elements" or "tokens".
        scale_free: Whether distances to rounding points are in units of the scale.
        mining_tokens: Approximate number of tokens that dependencies are measured on.
        percentiles, normalise, output, clip, clip_weights, search_tokens, weights: See
            `SearchOptions`.
        veo_order: "before" the search, as in the paper, or "after" it, with the ranges it chose.
        veo_layers: Layers whose dependencies L_ent sums: "vision", or "language" for the linears of
            the language model that read every token, as in the released code.
        veo_epochs, veo_batch_size, veo_learning_rate, veo_regression, veo_entropy, veo_error,
            veo_eta, veo_checkpointing, seed: See `Tuning`.

    Attributes:
        name: "Q-VLM" for the whole method. The name of a part states which parts it has, so that no
            table mistakes it for the whole.
        one_pass: Whether a stream is enough, which holds one layer at a time. Dependencies are
            mined in a pass of their own over the stream. The tower is tuned through the whole
            model, and segments of whole layers need several at once.

    Raises:
        UserError: If an option has a value that is not accepted; the message names both.
    """

    def __init__(
        self,
        cdm: bool = True,
        veo: bool = True,
        max_depth: int = 3,
        granularity: str = "linear",
        h0: float | None = None,
        proxy: str = "entropy",
        pairing: str = "elements",
        scale_free: bool = False,
        mining_tokens: int = 1024,
        percentiles: Sequence[float] = PERCENTILES,
        normalise: bool = True,
        output: str = "layer",
        clip: str = "percentile",
        clip_weights: bool = True,
        search_tokens: int = 4096,
        weights: str = "uniform",
        veo_order: str = "before",
        veo_epochs: int = 10,
        veo_batch_size: int = 8,
        veo_learning_rate: float = 1e-4,
        veo_regression: float = 1.0,
        veo_entropy: float = 0.1,
        veo_error: float = 1.0,
        veo_eta: float = 1.0,
        veo_layers: str = "vision",
        veo_checkpointing: bool | None = None,
        seed: int = 0,
    ) -> None:
        check_depth(max_depth)
        check_threshold(h0)
        for option, value, accepted in (
            ("granularity", granularity, GRANULARITIES),
            ("proxy", proxy, PROXIES),
            ("pairing", pairing, tuple(JOINTS)),
            ("veo_order", veo_order, ORDERS),
            ("veo_layers", veo_layers, tuple(OBSERVED)),
        ):
            validation.one_of(f"method.{option}", value, accepted)
        for option, switch in (("cdm", cdm), ("veo", veo), ("scale_free", scale_free)):
            validation.switch(f"method.{option}", switch)
        validation.whole_number("method.mining_tokens", mining_tokens)
        self.name = with_weights(_name(cdm, veo, proxy, granularity), weights)
        self.one_pass = not veo and (granularity == "linear" or not cdm)
        self.cdm = cdm
        self.veo = veo
        self.max_depth = max_depth if cdm else 1
        self.granularity = granularity
        self.h0 = h0
        self.joint = JOINTS[pairing]
        self.dependency = entropy(self.joint) if proxy == "entropy" else quantization_error
        self.scale_free = scale_free
        self.mining_tokens = mining_tokens
        # If whole layers are the units, no linear's output is the output of a unit.
        output = "layer" if granularity == "layer" else output
        self.search_options = SearchOptions(
            percentiles, normalise, output, clip, clip_weights, search_tokens, weights
        )
        self.veo_order = veo_order
        self.observed = OBSERVED[veo_layers]
        self.tuning = Tuning(
            veo_epochs,
            veo_batch_size,
            veo_learning_rate,
            veo_regression,
            veo_entropy,
            veo_error,
            veo_eta,
            veo_checkpointing,
            seed,
        )

    def quantize(self, walk: Walk) -> MethodReport:
        """Quantizes the walk's model in place.

        Returns:
            A report with the seconds of all parts. Its details contain the result of each segment,
            the dependencies and thresholds, and the losses of the fine-tuning.

        Raises:
            UserError: If `veo` is on and the calibration set contains no image, or if the ranges of
                activations are made of the prompt at hand, so that there is no grid before it.
        """
        if walk.quantization.language.granularity == "per_channel_prompt":
            raise UserError(
                f"{self.name} is not possible with quantizer.language.granularity="
                "per_channel_prompt (quantizer=released), because it searches ranges before there "
                "is a prompt. Choose one of: per_channel, per_channel_group, per_tensor, per_token"
            )
        begun = time.process_time()
        details: dict[str, Any] = {}
        after = self.veo and self.veo_order == "after"
        batches = with_images(walk.batches) if self.veo else []
        references = [reference(walk.model, batch) for batch in batches]
        if self.veo and not after:
            floats = simulate(walk, self.search_options)
            details["veo"] = fine_tune(
                walk.model, batches, references, self.observed(walk.model), self.joint, self.tuning
            )
            unwind(walk.model, floats)
            walk.uncalibrated.clear()  # it names layers of the simulation, which is undone
        segments = self._segments(walk, details) if self.cdm else {}
        found, without_data = self._search(walk, segments, keep_tower=after)
        if after:
            details["veo"] = fine_tune(
                walk.model, batches, references, self.observed(walk.model), self.joint, self.tuning
            )
            freeze(walk.model)
        details["blocks"] = found
        details["uncalibrated"] = list(walk.uncalibrated)
        details["unsearched"] = without_data
        return MethodReport(
            search_seconds=time.process_time() - begun,
            candidates=sum(block["candidates"] for block in found),
            details=details,
        )

    def _segments(self, walk: Walk, details: dict[str, Any]) -> dict[str, list[list[str]]]:
        """Mines dependencies; returns the segments of each chain, as names of the chain's units."""
        chains = mine(walk, self.dependency, self.granularity, self.mining_tokens, self.scale_free)
        thresholds = {
            part: mean_dependency([d for c in chains if c.part == part for d in c.dependencies])
            if self.h0 is None
            else self.h0
            for part in {chain.part: None for chain in chains}
        }
        details["h0"] = thresholds
        details["dependencies"] = [asdict(chain) for chain in chains]
        return {
            chain.name: [
                [chain.units[index] for index in segment]
                for segment in partition(chain.dependencies, self.max_depth, thresholds[chain.part])
            ]
            for chain in chains
        }

    def _search(
        self, walk: Walk, segments: dict[str, list[list[str]]], keep_tower: bool
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Searches and quantizes segment after segment.

        Returns:
            Entries of the segments in the report, and names of the linears without data to search.
        """
        entries: list[dict[str, Any]] = []
        without_data: list[str] = []
        layers = [segment for chain in segments.values() for segment in chain] or None
        for block in walk.blocks(layers if self.granularity == "layer" else None):
            if self.granularity == "layer":
                units = [_by_layer(block)]
            else:
                names = segments.get(block.name, [[name] for name in block.linears])
                units = [[[name] for name in segment] for segment in names]
            keep = keep_tower and block.kind == "vision"
            found = search_block(block, units, self.search_options, keep)
            entries += [{"block": block.name, **asdict(result)} for result in found]
            without_data += unsearched(block, found)
        return entries, without_data


def _name(cdm: bool, veo: bool, proxy: str, granularity: str) -> str:
    """The name of these parts of Q-VLM in tables."""
    if not cdm and not veo and granularity == "linear":
        return "Layer-wise"
    parts = {(True, True): [], (True, False): ["CDM only"], (False, True): ["VEO only"]}
    notes = parts.get((cdm, veo), ["neither"])
    notes += ["error proxy"] if cdm and proxy != "entropy" else []
    notes += ["whole layers"] if granularity == "layer" else []
    return ", ".join(["Q-VLM", *notes])


def _by_layer(block: Block) -> list[list[str]]:
    """The names of the linears of each layer of a block that consists of whole layers."""
    if not isinstance(block.module, nn.ModuleList):
        return [list(block.linears)]
    layers: dict[str, list[str]] = {}
    for name in block.linears:
        layers.setdefault(name.partition(".")[0], []).append(name)
    return list(layers.values())

"""Q-VLM: dependency mining, joint search of dependent layers, a vision tower that is easy to round.

arXiv 2410.08119. The order is the paper's: optimise the visual encoder (`vision.py`), mine the
dependencies of the model that results (`dependency.py`), group layers into blocks
(`partition.py`), search block after block (`search.py`).

What is quantized and how is the walk's affair. Each part can be switched off: without `cdm` every
layer is a block of its own, without `veo` the tower stays as it is, and without both this is the
layer-wise search that the paper compares with.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from qvlm.methods.base import MethodReport
from qvlm.methods.qvlm.dependency import JOINTS, entropy, mine, quantization_error
from qvlm.methods.qvlm.options import check_choice, check_switch, check_whole
from qvlm.methods.qvlm.partition import check_depth, check_threshold, mean_dependency, partition
from qvlm.methods.qvlm.search import search_block
from qvlm.methods.qvlm.trial import PERCENTILES, Search
from qvlm.methods.qvlm.vision import (
    Tuning,
    fine_tune,
    freeze,
    reference,
    simulate,
    tower_layers,
    unwind,
    with_images,
)
from qvlm.quantization import Block, Walk

GRANULARITIES = ("linear", "layer")
PROXIES = ("entropy", "quantization_error")
ORDERS = ("before", "after")


class QVLM:
    """Q-VLM, whole or in part.

    Args:
        cdm: mine dependencies and search dependent layers jointly.
        veo: optimise the visual encoder.
        max_depth: most layers in a block.
        granularity: what a layer is: "linear", the linears of a decoder layer in the order of the
            data, or "layer", a whole decoder layer, whose linears share a percentile.
        h0: threshold of the dependency in a block; None takes the mean, for vision and language
            apart.
        proxy: what a dependency is: "entropy", or "quantization_error" for comparison (Table 5).
        pairing: how activations are paired for the entropy: "elements" or "tokens".
        scale_free: measure distances to rounding points in units of the scale.
        mining_tokens: about how many tokens dependencies are measured on.
        percentiles, normalise, output, clip, clip_weights, search_tokens: see `Search`.
        veo_order: "before" the search, as in the paper, or "after" it, with its ranges.
        veo_epochs, veo_batch_size, veo_learning_rate, veo_regression, veo_entropy, veo_error,
            veo_eta, seed: see `Tuning`.

    Attributes:
        name: "Q-VLM" for the whole; a part says what it is, so that no table takes it for more.
        one_pass: whether each layer is looked at once, when it is quantized.

    Raises:
        UserError: naming the parameter and what it accepts.
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
        veo_order: str = "before",
        veo_epochs: int = 10,
        veo_batch_size: int = 8,
        veo_learning_rate: float = 1e-4,
        veo_regression: float = 1.0,
        veo_entropy: float = 0.1,
        veo_error: float = 1.0,
        veo_eta: float = 1.0,
        seed: int = 0,
    ) -> None:
        check_depth(max_depth)
        check_threshold(h0)
        for option, value, accepted in (
            ("granularity", granularity, GRANULARITIES),
            ("proxy", proxy, PROXIES),
            ("pairing", pairing, tuple(JOINTS)),
            ("veo_order", veo_order, ORDERS),
        ):
            check_choice(option, value, accepted)
        for option, switch in (("cdm", cdm), ("veo", veo), ("scale_free", scale_free)):
            check_switch(option, switch)
        check_whole("mining_tokens", mining_tokens)
        self.name = _name(cdm, veo, proxy, granularity)
        self.one_pass = not cdm and not veo
        self.cdm = cdm
        self.veo = veo
        self.max_depth = max_depth if cdm else 1
        self.granularity = granularity
        self.h0 = h0
        self.joint = JOINTS[pairing]
        self.dependency = entropy(self.joint) if proxy == "entropy" else quantization_error
        self.scale_free = scale_free
        self.mining_tokens = mining_tokens
        whole = "layer" if granularity == "layer" else output  # no linear is a whole layer's output
        self.search = Search(percentiles, normalise, whole, clip, clip_weights, search_tokens)
        self.veo_order = veo_order
        self.tuning = Tuning(
            veo_epochs,
            veo_batch_size,
            veo_learning_rate,
            veo_regression,
            veo_entropy,
            veo_error,
            veo_eta,
            seed,
        )

    def quantize(self, walk: Walk) -> MethodReport:
        """Quantizes the walk's model in place.

        Returns:
            A report with the seconds of all parts, and in its details the blocks with what was
            found for each, the dependencies and thresholds, and the losses of the fine-tuning.

        Raises:
            UserError: with `veo`, if the calibration set holds no image.
        """
        begun = time.perf_counter()
        details: dict[str, Any] = {}
        after = self.veo and self.veo_order == "after"
        batches = with_images(walk.batches) if self.veo else []
        references = [reference(walk.model, batch) for batch in batches]
        if self.veo and not after:
            floats = simulate(walk)
            details["veo"] = fine_tune(
                walk.model, batches, references, tower_layers(walk.model), self.joint, self.tuning
            )
            unwind(walk.model, floats)
            walk.uncalibrated.clear()  # of the simulation, which is gone
        plan = self._plan(walk, details) if self.cdm else {}
        found = self._search(walk, plan, keep_tower=after)
        if after:
            details["veo"] = fine_tune(
                walk.model, batches, references, tower_layers(walk.model), self.joint, self.tuning
            )
            freeze(walk.model)
        details["blocks"] = found
        details["uncalibrated"] = list(walk.uncalibrated)
        return MethodReport(
            search_seconds=time.perf_counter() - begun,
            candidates=sum(block["candidates"] for block in found),
            details=details,
        )

    def _plan(self, walk: Walk, details: dict[str, Any]) -> dict[str, list[list[str]]]:
        """The blocks of each chain of layers, as names of its units."""
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
                [chain.units[index] for index in run]
                for run in partition(chain.dependencies, self.max_depth, thresholds[chain.part])
            ]
            for chain in chains
        }

    def _search(
        self, walk: Walk, plan: dict[str, list[list[str]]], keep_tower: bool
    ) -> list[dict[str, Any]]:
        """Searches and quantizes block after block; says what was found, for the record."""
        found: list[dict[str, Any]] = []
        whole = [run for runs in plan.values() for run in runs] or None
        for block in walk.blocks(whole if self.granularity == "layer" else None):
            if self.granularity == "layer":
                runs = [_by_layer(block)]
            else:
                names = plan.get(block.name, [[name] for name in block.linears])
                runs = [[[name] for name in run] for run in names]
            keep = keep_tower and block.kind == "vision"
            for result in search_block(block, runs, self.search, keep):
                found.append({"block": block.name, **asdict(result)})
        return found


def _name(cdm: bool, veo: bool, proxy: str, granularity: str) -> str:
    """What tables call these parts of Q-VLM."""
    if not cdm and not veo and granularity == "linear":
        return "Layer-wise"
    parts = {(True, True): [], (True, False): ["CDM only"], (False, True): ["VEO only"]}
    notes = parts.get((cdm, veo), ["neither"])
    notes += ["error proxy"] if cdm and proxy != "entropy" else []
    notes += ["whole layers"] if granularity == "layer" else []
    return ", ".join(["Q-VLM", *notes])


def _by_layer(block: Block) -> list[list[str]]:
    """The linears of each layer of a block of whole layers."""
    if not isinstance(block.module, nn.ModuleList):
        return [list(block.linears)]
    layers: dict[str, list[str]] = {}
    for name in block.linears:
        layers.setdefault(name.partition(".")[0], []).append(name)
    return list(layers.values())

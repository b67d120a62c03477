"""How long methods take to quantize a 13B, extrapolated from a few of its layers."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from qvlm.errors import RunError
from qvlm.methods.awq import AWQ
from qvlm.methods.base import Method
from qvlm.methods.layerwise import LayerWise
from qvlm.methods.qvlm import QVLM
from qvlm.models.networks import image_tokens
from qvlm.quantization import Block, QuantizationConfig, Walk
from qvlm.quantization.targets import block_layers, quantizable
from qvlm.tables.gpu.bench import Bench, Measures
from qvlm.tables.gpu.forms import W4A4
from qvlm.tables.gpu.models import build, built_architecture


class TimedWalk(Walk):
    """A walk that notes how long a method works on each block.

    Attributes:
        spent: Seconds by kind and name of a block.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spent: dict[str, dict[str, float]] = {}

    def blocks(self, partition: Sequence[Sequence[str]] | None = None) -> Iterator[Block]:
        """Yields the blocks of `Walk.blocks`."""
        for block in super().blocks(partition):
            begun = time.perf_counter()
            yield block
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            kind = self.spent.setdefault(block.kind, {})
            kind[block.name] = kind.get(block.name, 0.0) + time.perf_counter() - begun


def method_seconds(bench: Bench, name: str, method: Method) -> Measures:
    """Quantizes a few layers of a model, and extrapolates to all of them.

    Args:
        bench: Device and sizes.
        name: Name of the architecture.
        method: Method that searches ranges.
    """
    bench.clear()
    model = build(bench, name, None, bench.sizes.layers)
    walk = TimedWalk(model, _calibration_batches(bench, name), _quantization(bench))
    if bench.gpu:
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    report = method.quantize(walk)
    bench.wait()
    seconds = time.perf_counter() - begun
    if any(quantizable(block) for _, block in block_layers(model, True).values()):
        raise RunError(f"Not all linears were quantized by {method.name}.")
    whole = built_architecture(name)
    counts = {
        "language": whole.text_config.num_hidden_layers,
        "vision": whole.vision_config.num_hidden_layers,
        "projector": 1,
    }
    per = {kind: statistics.fmean(found.values()) for kind, found in walk.spent.items()}
    inside = sum(sum(found.values()) for found in walk.spent.values())
    total = seconds - inside + sum(counts[kind] * per[kind] for kind in per)
    measures: dict[str, tuple[object, str]] = {
        "measured": (f"{seconds:.1f}", "s"),
        "decoder layer": (f"{per['language']:.2f}", "s"),
        "vision layer": (f"{per['vision']:.2f}", "s"),
        "candidates": (report.candidates, "1"),
        "all layers, extrapolated": (f"{total:.0f}", "s"),
        "all layers, extrapolated, GPU": (f"{total / 3600:.3f}", "h"),
    }
    if bench.gpu:
        measures["peak memory"] = (f"{torch.cuda.max_memory_allocated() / 2**30:.2f}", "GiB")
    return measures


def methods(bench: Bench) -> None:
    """Measures the search of the first model."""
    made: dict[str, Callable[[], Method]] = {
        "Q-VLM, CDM only": lambda: QVLM(veo=False),
        "Layer-wise": LayerWise,
        "AWQ": AWQ,
    }
    name, (decoder, tower) = bench.sizes.models[0], bench.sizes.layers

    def work(title: str) -> Measures:
        return method_seconds(bench, name, made[title]())

    for title in made:
        bench.do(
            *("method", name, title, bench.sizes.samples, f"{decoder} + {tower} layers"),
            work=partial(work, title),
            note="extrapolated from the layers that ran",
        )


def _quantization(bench: Bench) -> QuantizationConfig:
    """Returns W4A4 with searched ranges."""
    found = W4A4.quantization(bench.sizes.group)
    return replace(
        found,
        weight=replace(found.weight, ranges="lp"),
        language=replace(found.language, ranges="lp"),
        vision=replace(found.vision, ranges="lp"),
    )


def _calibration_batches(bench: Bench, name: str) -> list[dict[str, torch.Tensor]]:
    """Returns random images and tokens, in batches of at most eight rows."""
    whole, sizes = built_architecture(name), bench.sizes
    image, side = image_tokens(whole), whole.vision_config.image_size
    count = min(8, sizes.samples)
    torch.manual_seed(0)
    batches = []
    for _ in range(sizes.samples // count):
        ids = torch.randint(whole.text_config.vocab_size - 1, (count, image + sizes.text))
        ids[:, 1 : 1 + image] = whole.image_token_id
        pixels = torch.randn(count, 3, side, side, device=bench.device, dtype=bench.dtype)
        batches.append({"input_ids": ids.to(bench.device), "pixel_values": pixels})
    return batches

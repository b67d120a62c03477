"""Times peers in turn on the same weights."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig

from qvlm.tables.peers.base import Loaded, Peer, Start, Step
from qvlm.tables.peers.modules import random_model

PREFILL, DECODING = "prefill", "decoding"
LAYER, MODEL = "layer", "model"
TOKENS = 8  # timed rows of decoding, of which the median counts
PAUSE = 0.05  # seconds in which threads of the peer before go to sleep

# Seconds of each repeat by peer.
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        config: Shapes of the model.
        layers: Number of decoder layers of the models that are timed.
        prompt: Number of rows of a prefill.
        repeats: Number of timed repeats. One repeat before them warms up.
    """

    config: LlamaConfig
    layers: int
    prompt: int
    repeats: int


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        times: Seconds of each repeat, by part (`LAYER`, `MODEL`), phase (`PREFILL`, `DECODING`) and
            name of the peer. Those of `MODEL` are per decoder layer.
        weight_bytes: Bytes of the linears of one decoder layer, by name of the peer.
    """

    times: Mapping[tuple[str, str], Times]
    weight_bytes: Mapping[str, int]


def measure(peers: Sequence[Peer], setting: Setting) -> Measured:
    """Times peers that have no obstacle."""
    model = random_model(setting.config)
    loaded = {
        peer: peer.load(model, setting.layers)
        for peer in tqdm(peers, desc="quantizing", disable=None)
    }
    hidden, wide = setting.config.hidden_size, setting.config.intermediate_size
    inputs = {rows: _inputs(rows, hidden, wide) for rows in (setting.prompt, 1)}
    layer = _in_turn(loaded, LAYER, inputs, setting.repeats)
    embeddings = {rows: by_width[hidden] for rows, by_width in inputs.items()}
    whole = _in_turn(loaded, MODEL, embeddings, setting.repeats)
    times = {(LAYER, phase): found for phase, found in layer.items()}
    times |= {(MODEL, phase): _divided(found, setting.layers) for phase, found in whole.items()}
    return Measured(times, {peer.name: own.weight_bytes for peer, own in loaded.items()})


def _divided(times: Times, count: int) -> Times:
    return {name: [each / count for each in seconds] for name, seconds in times.items()}


def _inputs(rows: int, *widths: int) -> dict[int, Tensor]:
    return {width: torch.randn(rows, width) for width in widths}


def _in_turn(
    loaded: Mapping[Peer, Loaded], part: str, inputs: Mapping[int, Any], repeats: int
) -> dict[str, Times]:
    """Times one part of all peers that have it.

    Args:
        loaded: What each peer made of the model.
        part: `LAYER` or `MODEL`, a field of `Loaded`.
        inputs: Inputs of a step in float32 by number of rows, those of the prompt first.
        repeats: Number of timed repeats.
    """
    starts: dict[Peer, Start] = {
        peer: start for peer, own in loaded.items() if (start := getattr(own, part)) is not None
    }
    own = {dtype: _cast(inputs, dtype) for dtype in {peer.dtype for peer in starts}}
    found: dict[str, Times] = {
        phase: {peer.name: [] for peer in starts} for phase in (PREFILL, DECODING)
    }
    for repeat in tqdm(range(repeats + 1), desc=part, disable=None):
        for peer, start in starts.items():
            seconds = _sequence(start(), *own[peer.dtype])
            for phase, each in zip((PREFILL, DECODING), seconds, strict=True):
                if repeat:
                    found[phase][peer.name].append(each)
    return found


def _cast(inputs: Mapping[int, Any], dtype: torch.dtype) -> list[Any]:
    """Returns inputs, which are tensors or tensors by width, in another type."""
    return [
        x.to(dtype)
        if isinstance(x, Tensor)
        else {width: each.to(dtype) for width, each in x.items()}
        for x in inputs.values()
    ]


def _sequence(step: Step, prompt: Any, token: Any) -> tuple[float, float]:
    """Returns the seconds of a prompt, and the median of those of the tokens after it."""
    time.sleep(PAUSE)
    prefill = _seconds(step, prompt)
    _seconds(step, token)  # may bring weights into another layout
    return prefill, statistics.median(_seconds(step, token) for _ in range(TOKENS))


def _seconds(step: Step, x: Any) -> float:
    begun = time.perf_counter()
    step(x)
    return time.perf_counter() - begun

"""Times peers in turn on the same weights."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import LlamaConfig

from qvlm.tables.peers.base import Peer, Start, Step
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


@dataclass(frozen=True)
class _Turn:
    """What a peer does when it is its turn: a sequence of a prompt and tokens."""

    start: Start
    prompt: Any
    token: Any

    def seconds(self) -> tuple[float, float]:
        """Returns the seconds of the prompt, and the median of those of the tokens after it."""
        time.sleep(PAUSE)
        step = self.start()
        prefill = _seconds(step, self.prompt)
        _seconds(step, self.token)  # may bring weights into another layout
        return prefill, statistics.median(_seconds(step, self.token) for _ in range(TOKENS))


def measure(peers: Sequence[Peer], setting: Setting) -> Measured:
    """Times peers that have no obstacle."""
    model = random_model(setting.config)
    loaded = {
        peer: peer.load(model, setting.layers)
        for peer in tqdm(peers, desc="quantizing", disable=None)
    }
    hidden, wide = setting.config.hidden_size, setting.config.intermediate_size
    layer, whole = {}, {}
    for peer, own in loaded.items():
        by_width = [
            {width: torch.randn(rows, width, dtype=peer.dtype) for width in (hidden, wide)}
            for rows in (setting.prompt, 1)
        ]
        if own.layer is not None:
            layer[peer.name] = _Turn(own.layer, *by_width)
        if own.model is not None:
            whole[peer.name] = _Turn(own.model, *(each[hidden] for each in by_width))
    times = _in_turn(layer, LAYER, 1, setting.repeats)
    times |= _in_turn(whole, MODEL, setting.layers, setting.repeats)
    return Measured(times, {peer.name: own.weight_bytes for peer, own in loaded.items()})


def _in_turn(
    turns: Mapping[str, _Turn], part: str, layers: int, repeats: int
) -> dict[tuple[str, str], Times]:
    """Times one part of peers.

    Args:
        turns: What to time, by name of the peer.
        part: `LAYER` or `MODEL`.
        layers: Number of decoder layers of that part.
        repeats: Number of timed repeats.

    Returns:
        Seconds per decoder layer of each repeat, by part, phase and peer.
    """
    found: dict[tuple[str, str], Times] = {
        (part, phase): {name: [] for name in turns} for phase in (PREFILL, DECODING)
    }
    for repeat in tqdm(range(repeats + 1), desc=part, disable=None):
        for name, turn in turns.items():
            seconds = turn.seconds()
            if repeat:  # the first one warms up
                for times, each in zip(found.values(), seconds, strict=True):
                    times[name].append(each / layers)
    return found


def _seconds(step: Step, x: Any) -> float:
    begun = time.perf_counter()
    step(x)
    return time.perf_counter() - begun

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
    """Times peers that have no obstacle.

    Every repeat loads each peer anew: where in memory weights lie makes the same product up to 1.4
    times as slow, and stays as it is for as long as they lie there.
    """
    model = random_model(setting.config)
    hidden, wide = setting.config.hidden_size, setting.config.intermediate_size
    times: dict[tuple[str, str], Times] = {
        (part, phase): {} for part in (LAYER, MODEL) for phase in (PREFILL, DECODING)
    }
    weight_bytes = {}
    for repeat in tqdm(range(setting.repeats + 1), desc="repeats", disable=None):
        for peer in peers:
            own = peer.load(model, setting.layers)
            weight_bytes[peer.name] = own.weight_bytes
            prompt, token = (
                {width: torch.randn(rows, width, dtype=peer.dtype) for width in (hidden, wide)}
                for rows in (setting.prompt, 1)
            )
            turns = []
            if own.layer is not None:
                turns.append((LAYER, 1, _Turn(own.layer, prompt, token)))
            if own.model is not None:
                turn = _Turn(own.model, prompt[hidden], token[hidden])
                turns.append((MODEL, setting.layers, turn))
            for part, layers, turn in turns:
                for phase, seconds in zip((PREFILL, DECODING), turn.seconds(), strict=True):
                    if repeat:  # the first one warms up
                        times[part, phase].setdefault(peer.name, []).append(seconds / layers)
    return Measured(times, weight_bytes)


def _seconds(step: Step, x: Any) -> float:
    begun = time.perf_counter()
    step(x)
    return time.perf_counter() - begun

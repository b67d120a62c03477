"""Peak memory and time of a whole model, measured in a process that has no other model."""

import ctypes
import gc
from contextlib import suppress
from dataclasses import dataclass

from torch import nn

from qvlm.cell import inputs as prepare
from qvlm.models.architectures import architecture
from qvlm.models.networks import image_tokens
from qvlm.packing import weight_bytes
from qvlm.planning import footprint
from qvlm.planning.footprint import FULL, SCALE_ANSWER, Variant
from qvlm.quantization.targets import decoder_layers
from qvlm.runtime.stages import MIB, Stages
from qvlm.tables.table4_scale.clock import Clock, QuestionTimes, ask
from qvlm.tables.table4_scale.models import changer, configuration, place, shapes_of


@dataclass(frozen=True)
class Whole:
    """A whole model in a process of its own.

    Attributes:
        times: Seconds of a question.
        weights: Bytes of the weights.
        peak: Peak bytes of memory while the model answers.
        complete: Whether all layers ran.
    """

    times: QuestionTimes
    weights: int
    peak: float
    complete: bool


def whole(model: str, variant: Variant, layers: int, prompt: int, device: str) -> Whole:
    """Makes all of a model and runs it through its first decoder layers.

    Args:
        model: Option of conf/model.
        variant: Variant of the model.
        layers: Largest number of decoder layers that run.
        prompt: Number of tokens of image and text together.
        device: Device on which the model runs.
    """
    if device == "cpu":
        prepare.keep_few_primitives()
    built = architecture(model)
    placed = place(built, changer(model, variant), device)
    weights = weight_bytes(placed)
    decoder = list(decoder_layers(placed).values())
    complete = layers >= len(decoder)
    if not complete:
        placed.model.language_model.layers = nn.ModuleList(decoder[:layers])
        placed.config.text_config.num_hidden_layers = layers
    clock = Clock(placed, shapes_of(built), complete)
    _return_freed_memory()
    with Stages(model, 1) as stages, stages.stage("ask"):
        ask(clock, prompt, SCALE_ANSWER)  # warms up, and may bring weights into another layout
        times = ask(clock, prompt, SCALE_ANSWER)
    peak = stages.costs["ask"]["peak_mib" if device == "cpu" else "gpu_peak_mib"] * MIB
    text_tokens = prompt - image_tokens(built)
    need = footprint.predict(built, configuration(model, FULL), FULL, text_tokens, SCALE_ANSWER)
    peak += need.cache * (1 - min(layers, len(decoder)) / len(decoder))  # of layers left out
    return Whole(times, weights, peak, complete)


def _return_freed_memory() -> None:
    """Returns to the system what glibc's allocator keeps of freed memory.

    Making the layers leaves some behind. A process that loads packed shards has none of it.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)

"""The rows of one model: ratios from models side by side, memory and time from whole models."""

import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import psutil
import torch

from qvlm.errors import UserError
from qvlm.models.architectures import architecture
from qvlm.models.networks import image_tokens
from qvlm.planning import footprint, measured
from qvlm.planning.footprint import ANSWER_TOKENS, FULL, GIB, SCALE_ANSWER, Variant
from qvlm.runtime.processes import in_fresh_process
from qvlm.tables.cost import paper_columns
from qvlm.tables.labels import QVLM
from qvlm.tables.table4_scale.clock import Clock, QuestionTimes, ask
from qvlm.tables.table4_scale.mixture import Mixture, ask_both
from qvlm.tables.table4_scale.models import (
    OURS,
    PEER,
    SIMULATED,
    changer,
    configuration,
    place,
    shapes_of,
    shortened,
)
from qvlm.tables.table4_scale.search import SearchEstimate, estimate_search
from qvlm.tables.table4_scale.whole import Whole, whole

SIDE_BY_SIDE = 32  # tokens that are timed where one layer of a shape stands for all
PATIENCE = 20.0  # seconds that a whole model may take, for two questions


@dataclass(frozen=True)
class Setting:
    """How models are measured.

    Attributes:
        repeats: Number of repeats side by side.
        layers: Largest number of decoder layers that a whole model runs.
        prompt: Number of tokens of image and text together.
        memory: GiB that a whole model may take; None stands for all that is free.
        device: Device on which the models run.
        command: Command that regenerates the page.
    """

    repeats: int
    layers: int
    prompt: int
    memory: float | None
    device: str
    command: str

    def available(self) -> float:
        """Returns the bytes that a whole model may take."""
        if self.memory is not None:
            return self.memory * GIB
        if self.device != "cpu":
            return torch.cuda.mem_get_info()[0]
        return psutil.virtual_memory().available


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        columns: Row of the CSV. Columns of what was not measured are absent.
        predicted_gib: Predicted peak of memory; None for bitsandbytes.
        prefill_ratios: Speed-up of the prefill over bf16 in each repeat.
        decoding_ratios: Speed-up of decoding over bf16 in each repeat.
        mixtures: Times of ScienceQA's questions in each repeat.
    """

    columns: dict[str, Any]
    predicted_gib: float | None
    prefill_ratios: list[float]
    decoding_ratios: list[float]
    mixtures: list[Mixture] = field(default_factory=list)


@dataclass(frozen=True)
class Measured:
    """One model.

    Attributes:
        model: Option of conf/model.
        rows: One row per variant, bf16 first.
        search: Estimated cost of a search.
    """

    model: str
    rows: list[Row]
    search: SearchEstimate


def measure(model: str, setting: Setting) -> Measured:
    """Measures all variants of a model.

    Args:
        model: Option of conf/model.
        setting: How models are measured.

    Raises:
        UserError: If the prompt has no room for text beside the image.
    """
    images = image_tokens(architecture(model))
    if setting.prompt <= images:
        raise UserError(
            f"--prompt={setting.prompt} is too short for {model}. "
            f"Give more than its {images} image tokens."
        )
    peers = [PEER] if find_spec("bitsandbytes") else []
    variants = [*OURS, *peers, SIMULATED]
    sides, mixtures = side_by_side(model, variants, setting.repeats, setting.prompt, setting.device)
    simulated = sides.pop(SIMULATED)
    without_model = measured.without_model() if setting.device == "cpu" else 0
    rows = [
        replace(
            _row(model, variant, sides[FULL], repeats, without_model, setting),
            mixtures=mixtures[variant],
        )
        for variant, repeats in sides.items()
    ]
    full = rows[0].columns["peak_memory_gib"]
    for row in rows:
        if "peak_memory_gib" in row.columns:
            row.columns["memory_ratio"] = full / row.columns["peak_memory_gib"]
    return Measured(model, rows, estimate_search(model, simulated, setting.prompt))


def _row(
    model: str,
    variant: Variant,
    full: Sequence[QuestionTimes],
    repeats: Sequence[QuestionTimes],
    without_model: int,
    setting: Setting,
) -> Row:
    """Makes the row of a variant.

    Args:
        model: Option of conf/model.
        variant: Variant of the row.
        full: Times of bf16 side by side, one per repeat.
        repeats: Times of the variant side by side, one per repeat.
        without_model: Bytes of a process that has no model.
        setting: How models are measured.
    """
    times = QuestionTimes(*map(statistics.median, zip(*map(astuple, repeats), strict=True)))
    memory: dict[str, float] = {}
    predicted, extrapolated = None, "time"
    if variant != PEER:
        weights, peak, done = _whole_model(model, variant, times, without_model, setting)
        predicted = peak / GIB
        extrapolated = "time, memory"
        if done is not None:
            weights, peak, times = done.weights, done.peak, done.times
            extrapolated = "" if done.complete else "time"
        memory = {"peak_memory_gib": peak / GIB, "weight_gib": weights / GIB}
    ratios = [before.over(own) for before, own in zip(full, repeats, strict=True)]
    whole_ratios = [
        before.question / own.question for before, own in zip(full, repeats, strict=True)
    ]
    # The paper has one row for each method; Q-VLM's weights are uniform.
    method = QVLM if variant.method == "uniform" else variant.method
    columns = {
        **{"model": model, "bits": variant.label, "method": variant.method},
        **memory,
        **{"device": setting.device, "threads": torch.get_num_threads()},
        "seconds_per_question": times.question,
        "vision_s": times.vision,
        "prefill_s": times.prefill,
        "decode_s": ANSWER_TOKENS * times.token,
        "tokens_per_s": 1 / times.token,
        "speed_ratio": statistics.median(whole_ratios),
        "speed_ratio_low": min(whole_ratios),
        "speed_ratio_high": max(whole_ratios),
        "extrapolated": extrapolated,
        **paper_columns(model, variant.label, method),
    }
    prefill = [ratio.prefill for ratio in ratios]
    return Row(columns, predicted, prefill, [ratio.token for ratio in ratios])


def _whole_model(
    model: str,
    variant: Variant,
    expected: QuestionTimes,
    without_model: int,
    setting: Setting,
) -> tuple[int, float, Whole | None]:
    """Predicts the memory of a whole model, and runs the model if it fits.

    Returns:
        Predicted bytes of the weights, predicted bytes of the peak, and what was measured.
    """
    built = architecture(model)
    config = configuration(model, variant)
    text_tokens = setting.prompt - image_tokens(built)
    need = footprint.predict(built, config, variant, text_tokens, SCALE_ANSWER)
    predicted = float(without_model + need.total)
    if predicted >= setting.available():
        return need.weights, predicted, None
    count = built.text_config.num_hidden_layers
    seconds = expected.vision + expected.prefill + (SCALE_ANSWER + 1) * expected.token
    allowed = max(1, min(setting.layers, int(count * PATIENCE / (2 * seconds))))
    done = in_fresh_process(whole, model, variant, allowed, setting.prompt, setting.device)
    return need.weights, predicted, done


def side_by_side(
    model: str, variants: Sequence[Variant], repeats: int, prompt: int, device: str
) -> tuple[dict[Variant, list[QuestionTimes]], dict[Variant, list[Mixture]]]:
    """Times variants of a model in turn, each with a layer of each shape.

    Args:
        model: Option of conf/model.
        variants: Variants to time.
        repeats: Number of timed repeats. One repeat before them warms up.
        prompt: Number of tokens of image and text together.
        device: Device on which the models run.

    Returns:
        Times of a question to the full model, extrapolated, by variant and repeat; and those of
        ScienceQA's questions, which the simulation is not asked.
    """
    built = architecture(model)
    shapes = shapes_of(built)
    decoder = [shape for name, shape in shapes.items() if "language_model" in name]
    enough = 1 + max(decoder.index(shape) for shape in set(decoder))
    small = shortened(built, enough, 2)
    clocks: dict[Variant, Clock] = {}
    for variant in variants:
        placed = place(small, changer(model, variant), device)
        if clocks:  # all variants share what no variant changes
            first = next(iter(clocks.values())).model
            placed.set_input_embeddings(first.get_input_embeddings())
            placed.lm_head = first.lm_head
        clocks[variant] = Clock(placed, shapes, whole=False)
    found: dict[Variant, list[QuestionTimes]] = {variant: [] for variant in variants}
    mixtures: dict[Variant, list[Mixture]] = {variant: [] for variant in variants}
    for repeat in range(repeats + 1):
        for variant, clock in clocks.items():
            times = ask(clock, prompt, SIDE_BY_SIDE)
            if repeat:
                found[variant].append(times)
        for variant, clock in clocks.items():
            if repeat and variant != SIMULATED:
                mixtures[variant].append(ask_both(clock, image_tokens(built), SIDE_BY_SIDE))
    return found, mixtures

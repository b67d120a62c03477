"""Time and memory of models that answer questions, side by side and each in a fresh process."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import psutil
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from qvlm.data.scienceqa import load_scienceqa
from qvlm.models.loaded import LoadedModel
from qvlm.packing import kernels_used, weight_bytes
from qvlm.planning.footprint import GIB
from qvlm.records.record import Record
from qvlm.runtime.processes import in_fresh_process
from qvlm.runtime.stages import MIB, Stages
from qvlm.tables.cost import paper_columns
from qvlm.tables.published import paper_model
from qvlm.tables.table4.subjects import Subject


@dataclass(frozen=True)
class RepeatTimes:
    """Seconds that the questions of one repeat took together.

    Attributes:
        vision: Seconds of the vision tower and the projector.
        prefill: Seconds of reading the prompts.
        decode: Seconds of generating the answers.
        tokens: Number of generated tokens.
    """

    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    tokens: int = 0

    @property
    def all(self) -> float:
        """Seconds from the image to the last token."""
        return self.vision + self.prefill + self.decode

    def __add__(self, other: "RepeatTimes") -> "RepeatTimes":
        return RepeatTimes(
            self.vision + other.vision,
            self.prefill + other.prefill,
            self.decode + other.decode,
            self.tokens + other.tokens,
        )


@dataclass(frozen=True)
class Alone:
    """A model in a process of its own.

    Attributes:
        before: Resident bytes of the process without a model; 0 on a GPU.
        peak: Peak bytes of the process, or of the GPU's allocator, while the model answers.
        weights: Bytes of the model's weights.
        kernels: Number of calls of packed products, by kernel.
    """

    before: float
    peak: float
    weights: int
    kernels: dict[str, int]


@dataclass(frozen=True)
class Measured:
    """A row of the table.

    Attributes:
        record: Record of the cell.
        columns: Row of the CSV.
        ratios: Speed-up over full precision in each repeat.
        alone: Memory of the model.
        weight_ratio: Weight bytes of full precision over those of the model.
        disagreements: See `Subject.disagreements`.
    """

    record: Record
    columns: dict[str, Any]
    ratios: list[float]
    alone: Alone
    weight_ratio: float
    disagreements: dict[str, list[str]]


def measure(subjects: Sequence[Subject], questions: int, repeats: int) -> list[Measured]:
    """Measures the models of one architecture.

    Args:
        subjects: Models to measure, full precision first.
        questions: Number of questions asked in each repeat.
        repeats: Number of timed repeats.
    """
    config = subjects[0].record.config
    data, longest = config["data"], config["evaluation"]["max_new_tokens"]
    asked: datasets.Dataset = load_scienceqa(data["source"], data["split"], questions, data["seed"])
    problems = [asked[row] for row in range(len(asked))]
    memory = [in_fresh_process(alone, subject, problems, longest) for subject in subjects]
    times = side_by_side(subjects, problems, repeats, longest)
    rows = []
    for subject, own, mine in zip(subjects, memory, times, strict=True):
        record = subject.record
        ratios = [full.all / repeat.all for full, repeat in zip(times[0], mine, strict=True)]
        columns = {
            **dict(model=record.model, bits=record.bits, method=record.method),
            **dict(device=subject.device, threads=torch.get_num_threads()),
            **_time_columns(mine, len(problems)),
            "peak_memory_gib": own.peak / GIB,
            "weight_gib": own.weights / GIB,
            "accuracy": record.metrics["classes"]["Avg"]["accuracy"],
            "memory_ratio": memory[0].peak / own.peak,
            "speed_ratio": statistics.median(ratios),
            **dict(speed_ratio_low=min(ratios), speed_ratio_high=max(ratios)),
            "extrapolated": False,
            **paper_columns(paper_model(record), record.bits, record.method),
        }
        weight_ratio = memory[0].weights / own.weights
        rows.append(Measured(record, columns, ratios, own, weight_ratio, subject.disagreements()))
    return rows


def _time_columns(repeats: Sequence[RepeatTimes], questions: int) -> dict[str, float]:
    """Returns the medians over the repeats, in seconds per question."""

    def median(part: str) -> float:
        return statistics.median(getattr(repeat, part) for repeat in repeats) / questions

    return {
        "seconds_per_question": median("all"),
        **{f"{part}_s": median(part) for part in ("vision", "prefill", "decode")},
        "tokens_per_s": statistics.median(repeat.tokens / repeat.decode for repeat in repeats),
    }


def side_by_side(
    subjects: Sequence[Subject], problems: Sequence[Mapping[str, Any]], repeats: int, longest: int
) -> list[list[RepeatTimes]]:
    """Times the models in turn, in this process. A repeat before the timed ones warms up.

    Args:
        subjects: Models to time.
        problems: Problems of each repeat.
        repeats: Number of timed repeats.
        longest: Number of tokens after which an answer is cut.

    Returns:
        Times by model and repeat.
    """
    models = [subject.load() for subject in subjects]
    found: list[list[RepeatTimes]] = [[] for _ in subjects]
    for repeat in tqdm(range(repeats + 1), subjects[0].record.model, disable=None):
        for loaded, times in zip(models, found, strict=True):
            taken = sum((ask(loaded, problem, longest) for problem in problems), RepeatTimes())
            if repeat:
                times.append(taken)
    return found


def alone(subject: Subject, problems: Sequence[Mapping[str, Any]], longest: int) -> Alone:
    """Loads a model, lets it answer, and watches the memory of the process.

    Args:
        subject: Model to measure.
        problems: Problems that it answers.
        longest: Number of tokens after which an answer is cut.
    """
    before = 0.0 if subject.device != "cpu" else psutil.Process().memory_info().rss
    with Stages(subject.record.name, 1) as stages, stages.stage("answer"):
        loaded = subject.load()
        for problem in problems:
            ask(loaded, problem, longest)
    cost = stages.costs["answer"]
    peak = cost.get("gpu_peak_mib", cost["peak_mib"]) * MIB
    return Alone(before, peak, weight_bytes(loaded.model), kernels_used(loaded.model))


@torch.no_grad()
def ask(loaded: LoadedModel, problem: Mapping[str, Any], longest: int) -> RepeatTimes:
    """Times the greedy answer to one problem.

    Args:
        loaded: Model with its tokenizer and image processor.
        problem: Problem in ScienceQA's schema.
        longest: Number of tokens after which the answer is cut.
    """
    model = loaded.model
    batch = loaded.encode([problem])
    ids = batch["input_ids"]

    def now() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    started = now()
    embedded = model.get_input_embeddings()(ids)
    if "pixel_values" in batch:
        features = model.model.get_image_features(batch["pixel_values"]).pooler_output
        embedded[ids == model.config.image_token_id] = torch.cat(tuple(features))
    seen = now()
    cache = DynamicCache()
    step: Callable[..., Any] = partial(model.__call__, past_key_values=cache, logits_to_keep=1)
    token: Tensor = step(inputs_embeds=embedded).logits.argmax(2)
    read = now()
    tokens = 1
    while token.item() != loaded.tokenizer.eos_token_id and tokens < longest:
        token = step(input_ids=token).logits.argmax(2)
        tokens += 1
    return RepeatTimes(seen - started, read - seen, now() - read, tokens)

"""Time and memory of models that answer questions, side by side and each in a fresh process."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import datasets
import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from qvlm.data.scienceqa import load_scienceqa
from qvlm.models.cache import CACHE, growing_cache
from qvlm.models.loaded import LoadedModel
from qvlm.packing import kernels_used, weight_bytes
from qvlm.runtime.processes import in_fresh_process
from qvlm.runtime.stages import MIB, Stages
from qvlm.tables.table4.facts import Alone, RepeatTimes, Timed
from qvlm.tables.table4.subjects import Subject


def measure(subjects: Sequence[Subject], questions: int, repeats: int) -> list[Timed]:
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
    return [
        Timed(
            subject.record.name,
            {name: record.name for name, record in subject.others.items()},
            mine,
            own,
        )
        for subject, mine, own in zip(subjects, times, memory, strict=True)
    ]


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
    step: Callable[..., Any] = partial(
        model.__call__, **{CACHE: growing_cache(model)}, logits_to_keep=1
    )
    token: Tensor = step(inputs_embeds=embedded).logits.argmax(2)
    read = now()
    tokens = 1
    while token.item() != loaded.tokenizer.eos_token_id and tokens < longest:
        token = step(input_ids=token).logits.argmax(2)
        tokens += 1
    return RepeatTimes(seen - started, read - seen, now() - read, tokens)

"""Runs a model over ScienceQA problems through lm-eval and keeps every answer.

lm-eval builds the requests, calls the model and scores; `lm_eval.evaluator.evaluate` is called
rather than `simple_evaluate`, which reseeds the global generators and inspects the machine with
subprocesses. No cache is used: lm-eval's is keyed by the text alone and would return the answers of
the model before it was quantized.
"""

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.evaluator
import pandas as pd
import torch
from lm_eval.tasks import TaskManager
from torch import nn

from qvlm.errors import RunError, UserError
from qvlm.evaluation.adapter import InMemoryModel
from qvlm.evaluation.answers import KeptAnswers
from qvlm.evaluation.metrics import class_metrics
from qvlm.models.loaded import LoadedModel

_TASK = "scienceqa"
_RULES = ("wrong", "random")


@dataclass(frozen=True)
class Evaluation:
    """What one model made of one set of questions.

    Attributes:
        metrics: `classes` (see `class_metrics`) and `unparsable_rule`.
        predictions: one row per question in the data set's order, with the columns `question_id`,
            `subject`, `grade`, `skill`, `has_image`, `has_text`, `n_choices`, `answer`,
            `prediction` (missing if unparsable), `correct`, `text`.
        resumed: how many of the answers an earlier evaluation had given and kept.
        shares: how many questions each process answered.
        observed: what `observe` said of the model in each process.
    """

    metrics: dict[str, Any]
    predictions: pd.DataFrame
    resumed: int = 0
    shares: list[int] = field(default_factory=list)
    observed: list[Any] = field(default_factory=list)


def evaluate(
    loaded: LoadedModel,
    dataset: datasets.Dataset,
    batch_size: int,
    max_new_tokens: int,
    unparsable: str = "wrong",
    seed: int = 0,
    progress: bool = True,
    temperature: float = 0.0,
    answers: Path | None = None,
    observe: Callable[[nn.Module], Any] | None = None,
) -> Evaluation:
    """Asks every question, of all processes that there are, and scores the answers.

    Args:
        loaded: the model.
        dataset: problems in ScienceQA's schema.
        batch_size: questions per batch; it has no influence on greedy answers beyond rounding.
        max_new_tokens: where an answer is cut off.
        unparsable: what an answer without a letter is: "wrong", or a "random" choice as in the
            official script.
        seed: of that choice, and of sampling.
        progress: shows a bar if stderr is a terminal.
        temperature: 0 is greedy; above, tokens are sampled from the whole distribution.
        answers: a folder to keep the answers in as they are given; those that are there already,
            of the same model and options, are not asked again.
        observe: a function to look at the model with, in each process, when it has answered.

    Raises:
        UserError: for an option outside its range, no questions, or an image that does not decode.
        RunError: if logits are not finite or not one answer can be parsed.
    """
    _check(dataset, batch_size, max_new_tokens, unparsable, temperature)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    kept = KeptAnswers(answers) if answers else None
    with _quiet_lm_eval(), _preserved(loaded.model.device):
        manager = TaskManager(
            include_path=Path(__file__).parent,
            include_defaults=False,
            metadata={
                "dataset": dataset,
                "prompting": loaded.prompting,
                "unparsable": unparsable,
                "seed": seed,
            },
        )
        tasks = manager.load(_TASK)
        tasks["tasks"][_TASK].set_config(
            "generation_kwargs", {"max_gen_toks": max_new_tokens, **sampling}, update=True
        )
        model = InMemoryModel(loaded, batch_size, seed, kept, progress, observe)
        results = lm_eval.evaluator.evaluate(model, tasks, bootstrap_iters=0, log_samples=False)
    predictions = pd.DataFrame(results["results"][_TASK]["predictions,none"])
    predictions["prediction"] = predictions["prediction"].astype("Int64")
    if predictions["prediction"].isna().all():
        raise RunError(
            f"model {loaded.name}: none of its {len(predictions)} answers can be parsed, the first "
            f"is {predictions['text'].iloc[0][:80]!r}; check that prompt format "
            f"{loaded.prompting.format} and conversation {loaded.prompting.conversation} are those "
            f"of the checkpoint, that max_new_tokens={max_new_tokens} leaves room for the answer, "
            "and the scales of quantized layers"
        )
    return Evaluation(
        {"classes": class_metrics(predictions), "unparsable_rule": unparsable},
        predictions,
        sum(share.resumed for share in model.shares),
        [sum(map(len, share.answers.values())) for share in model.shares],
        [share.observed for share in model.shares],
    )


def _check(
    dataset: datasets.Dataset,
    batch_size: int,
    max_new_tokens: int,
    unparsable: str,
    temperature: float,
) -> None:
    if unparsable not in _RULES:
        raise UserError(
            f"evaluation.unparsable: {unparsable!r} is unknown; accepted are {', '.join(_RULES)}"
        )
    for option, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise UserError(f"evaluation.{option}: {value} is not accepted; give at least 1")
    if not 0 <= temperature < float("inf"):
        raise UserError(
            f"evaluation.temperature: {temperature} is not accepted; give 0 for greedy or more"
        )
    if len(dataset) == 0:
        raise UserError("data: there are no questions to evaluate; give a split with at least one")


@contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Silences lm-eval's notices and its own bar, which shows even where there is no terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    requests_module: Any = lm_eval.api.task
    bar = requests_module.tqdm
    logger.setLevel(logging.ERROR)
    requests_module.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        requests_module.tqdm = bar
        logger.setLevel(level)


@contextmanager
def _preserved(device: torch.device) -> Iterator[None]:
    """Gives the caller's random states back: sampling seeds torch.

    Python's is among them: lm-eval draws from it for task names that it never uses.
    """
    state = random.getstate()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(state)

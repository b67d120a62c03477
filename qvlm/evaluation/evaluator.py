"""Runs a model over ScienceQA problems through lm-eval and keeps every answer.

lm-eval builds the requests, calls the model and scores. We call `lm_eval.evaluator.evaluate` and
not `simple_evaluate`, which reseeds the global generators and starts subprocesses to inspect the
machine. lm-eval's cache stays off: its keys contain the text only, so it would return the answers
that the model gave before it was quantized.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import lm_eval.evaluator
import pandas as pd
from lm_eval.tasks import TaskManager
from torch import nn

from qvlm.config.schema import UNPARSABLE
from qvlm.errors import RunError, UserError
from qvlm.evaluation.adapter import InMemoryModel, Watch
from qvlm.evaluation.answers import KeptAnswers
from qvlm.evaluation.divergence import Divergence
from qvlm.evaluation.harness import preserved, quiet_lm_eval
from qvlm.evaluation.metrics import class_metrics
from qvlm.models.loaded import LoadedModel
from qvlm.validation import one_of

# Task by `evaluation.scoring`.
_TASKS = {"generate": "scienceqa", "rank": "scienceqa_ranked"}
# Percentage of cut answers above which a user is warned.
CUT_WARNING = 1.0


@dataclass(frozen=True)
class Evaluation:
    """One model's answers to one set of questions.

    Attributes:
        metrics: `classes` (see `class_metrics`), `unparsable_rule`, and `cut`, the share of answers
            in percent that reached the limit of new tokens. With a divergence also `kl`, its
            `summary`.
        predictions: One row per question in the data set's order, with the columns `question_id`,
            `official_id` (missing where the source has none), `subject`, `grade`, `skill`,
            `has_image`, `has_text`, `n_choices`, `answer`, `prediction` (missing if unparsable),
            `correct`, `text`, `cut`. With a divergence also `kl`, nats over all tokens of the
            expected answer, and `answer_tokens`, their number; both are missing for a question that
            it was not measured on.
        resumed: Number of answers that an earlier evaluation had kept.
        shares: Number of questions that each rank answered.
        observed: Return value of `observe` on each rank.
    """

    metrics: dict[str, Any]
    predictions: pd.DataFrame
    resumed: int = 0
    shares: list[int] = field(default_factory=list)
    observed: list[Any] = field(default_factory=list)

    def with_divergence(self, divergence: Divergence) -> "Evaluation":
        """Returns this evaluation with the divergence from full precision.

        Args:
            divergence: Divergence on the expected answers of the first questions.
        """
        predictions = self.predictions.copy()
        first = predictions.index[: len(divergence.tokens)]
        predictions["kl"] = pd.Series(divergence.nats, index=first, dtype="float64")
        predictions["answer_tokens"] = pd.Series(divergence.tokens, index=first, dtype="Int64")
        return replace(
            self, metrics={**self.metrics, "kl": divergence.summary()}, predictions=predictions
        )


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
    watch: Watch | None = None,
    scoring: str = "generate",
) -> Evaluation:
    """Asks every question, on all ranks, and scores the answers.

    Warns if more than 1 % of the answers reach the limit of new tokens.

    Args:
        loaded: Model with its tokenizer and image processor.
        dataset: Problems in ScienceQA's schema.
        batch_size: Number of questions per batch. It changes greedy answers through rounding only.
        max_new_tokens: Number of tokens after which an answer is cut. A batch generates no more
            than its longest prompt leaves of the model's context.
        unparsable: Rule for an answer without a letter: "wrong", or a "random" choice as in the
            official script.
        seed: Seed of that choice, and of sampling.
        progress: Whether to show a bar if stderr is a terminal.
        temperature: Sampling temperature. 0 means greedy; above 0, tokens are sampled from the
            whole distribution.
        answers: Folder that keeps the answers while the evaluation runs. Answers that it already
            holds, of the same model and options, are reused.
        observe: Function that is called with each rank's model after the last question, or with
            that of rank 0 where answers are ranked.
        watch: Function that is called after each batch of rank 0; see `Watch`.
        scoring: "generate" lets the model write answers. "rank" takes the choice whose letter is
            the most likely answer; nothing is generated then, and nothing is unparsable.

    Raises:
        UserError: If an option is outside its range, there are no questions, an image does not
            decode, or a prompt leaves no room for an answer in the model's context.
        RunError: If logits are not finite, or not a single answer can be parsed.
    """
    _check(dataset, batch_size, max_new_tokens, unparsable, temperature)
    one_of("evaluation.scoring", scoring, _TASKS)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    kept = KeptAnswers(answers) if answers else None
    with quiet_lm_eval(), preserved(loaded.model.device):
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
        tasks = manager.load(name := _TASKS[scoring])
        if scoring == "generate":
            limits = {"max_gen_toks": max_new_tokens, **sampling}
            tasks["tasks"][name].set_config("generation_kwargs", limits, update=True)
        model = InMemoryModel(
            loaded, batch_size, seed, kept, progress, observe, watch, shorten=False
        )
        results = lm_eval.evaluator.evaluate(model, tasks, bootstrap_iters=0, log_samples=False)
    predictions = pd.DataFrame(results["results"][name]["predictions,none"])
    predictions["prediction"] = predictions["prediction"].astype("Int64")
    predictions["cut"] = model.cut if scoring == "generate" else False
    cut = 100 * float(predictions["cut"].mean())
    if cut > CUT_WARNING:
        warnings.warn(
            f"model {loaded.name}: {cut:.1f} % of its answers reached "
            f"evaluation.max_new_tokens={max_new_tokens} or the end of its context and were cut; "
            "give a larger limit",
            RuntimeWarning,
            stacklevel=2,
        )
    if predictions["prediction"].isna().all():
        raise RunError(
            f"model {loaded.name}: none of its {len(predictions)} answers can be parsed. The "
            f"first is {predictions['text'].iloc[0][:80]!r}. Check that prompt format "
            f"{loaded.prompting.format} and conversation {loaded.prompting.conversation} are those "
            f"of the checkpoint, that max_new_tokens={max_new_tokens} leaves room for the answer, "
            "and the scales of quantized layers"
        )
    return Evaluation(
        {"classes": class_metrics(predictions), "unparsable_rule": unparsable, "cut": cut},
        predictions,
        sum(rank.resumed for rank in model.ranks),
        [sum(map(len, rank.answers.values())) for rank in model.ranks] or [len(predictions)],
        [rank.observed for rank in model.ranks] or ([observe(loaded.model)] if observe else []),
    )


def _check(
    dataset: datasets.Dataset,
    batch_size: int,
    max_new_tokens: int,
    unparsable: str,
    temperature: float,
) -> None:
    if unparsable not in UNPARSABLE:
        raise UserError(
            f"evaluation.unparsable={unparsable!r} is not a rule. "
            f"Choose one of: {', '.join(UNPARSABLE)}."
        )
    for option, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise UserError(f"evaluation.{option}={value} is not accepted. Give at least 1.")
    if not 0 <= temperature < float("inf"):
        raise UserError(
            f"evaluation.temperature={temperature} is not accepted. Give 0 for greedy, or more."
        )
    if len(dataset) == 0:
        raise UserError("data: there are no questions to evaluate. Give a split with at least one")

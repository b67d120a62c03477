"""An lm-eval model that wraps a model in memory: batched generation and log-likelihoods.

lm-eval's own multimodal wrapper needs a processor that is loaded by name, and it fails on a batch
without an image and on multiple choice with images. This adapter encodes exactly the context and
the image that lm-eval passes to it, and serves every type of request, with images or without.

Ranks take whole batches from a shared work queue (`qvlm.runtime.workers`). Batches do not depend on
the number of ranks, so neither padding nor answers do. lm-eval itself sees a single process.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Protocol

import datasets
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from PIL.Image import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from qvlm.errors import RunError, UserError
from qvlm.evaluation import likelihood
from qvlm.evaluation.answers import Answer, KeptAnswers
from qvlm.evaluation.decoding import decode
from qvlm.evaluation.likelihood import Likelihood, Passage
from qvlm.evaluation.metrics import wilson
from qvlm.evaluation.task import score
from qvlm.models.loaded import LoadedModel
from qvlm.runtime.workers import WorkQueue, is_rank_zero, run_on_all_ranks

_IMAGE = datasets.Image(mode="RGB")


class Watch(Protocol):
    """A function that is told how far an evaluation is: of rank 0, if there are several."""

    def __call__(
        self, answered: int, total: int, accuracy: float, ci_low: float, ci_high: float
    ) -> None:
        """Takes numbers of questions, and the accuracy so far with its interval, in percent."""


@dataclass(frozen=True)
class RankAnswers:
    """The answers that one rank gave.

    Attributes:
        answers: Answers of each batch, by the position of its first question.
        resumed: Number of answers that an earlier evaluation had kept.
        observed: Return value of `observe` on this rank.
    """

    answers: dict[int, list[Answer]]
    resumed: int
    observed: Any


class InMemoryModel(LM):
    """Wraps a `LoadedModel` for lm-eval.

    Args:
        loaded: Model with its tokenizer and image processor.
        batch_size: Number of questions per batch.
        seed: Seed of sampling. Each batch derives its own seed from it.
        kept: Store of answers: those of an earlier evaluation are reused, new ones are added.
        progress: Whether to show a bar over the questions. It shows on a terminal only.
        observe: Function that is called with each rank's model after the last question.
        watch: Function that is called after each batch of rank 0.

    Attributes:
        ranks: Answers of each rank, once all questions are answered.
        cut: Whether each answer reached the limit of new tokens, in the order of the requests.
    """

    MULTIMODAL = True

    def __init__(
        self,
        loaded: LoadedModel,
        batch_size: int,
        seed: int = 0,
        kept: KeptAnswers | None = None,
        progress: bool = True,
        observe: Callable[[nn.Module], Any] | None = None,
        watch: Watch | None = None,
    ) -> None:
        super().__init__()
        self.loaded = loaded
        self.batch_size = batch_size
        self.seed = seed
        self.kept = kept
        self.progress = progress
        self.observe = observe
        self.watch = watch
        self.ranks: list[RankAnswers] = []
        self.cut: list[bool] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what only rank 0 needs, so that the other ranks can be sent the rest."""
        return {**self.__dict__, "watch": None}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generates one text per request, in the order of the requests.

        Batches are sorted from long to short, with images first. This keeps padding small, skips
        the vision tower for batches without images, and makes a batch that does not fit in memory
        fail at the beginning.
        """
        longest_first = sorted(range(len(requests)), key=lambda row: _size(requests[row]))[::-1]
        batches = {
            start: [requests[row] for row in longest_first[start : start + self.batch_size]]
            for start in range(0, len(requests), self.batch_size)
        }
        self.ranks = run_on_all_ranks(
            InMemoryModel._on_rank, self, batches, WorkQueue(len(batches))
        )
        by_start = {start: given for rank in self.ranks for start, given in rank.answers.items()}
        in_batches = [answer for start in sorted(by_start) for answer in by_start[start]]
        answers = dict(zip(longest_first, in_batches, strict=True))
        self.cut = [answers[row].cut for row in range(len(requests))]
        return [answers[row].text for row in range(len(requests))]

    def _on_rank(self, batches: Mapping[int, Sequence[Instance]], queue: WorkQueue) -> RankAnswers:
        """Answers the batches that this rank takes. The bar shows the progress of all ranks."""
        starts = list(batches)
        answers = {}
        asked = right = 0
        watch = self.watch if is_rank_zero() else None
        with (
            tqdm(
                total=sum(map(len, batches.values())),
                desc=f"{self.loaded.name}: questions",
                unit="q",
                disable=None if self.progress and is_rank_zero() else True,
            ) as bar,
            queue as numbers,
        ):
            for start in map(starts.__getitem__, numbers):
                bar.update(start - bar.n)
                answers[start] = self._answers(start, batches[start])
                if watch is not None:
                    asked += len(batches[start])
                    right += _count_right(batches[start], answers[start])
                    low, high = wilson(right, asked)
                    watch(asked, bar.total, 100 * right / asked, 100 * low, 100 * high)
            bar.update(bar.total - bar.n)
        observed = self.observe(self.loaded.model) if self.observe else None
        return RankAnswers(answers, self.kept.resumed if self.kept else 0, observed)

    def _answers(self, start: int, requests: Sequence[Instance]) -> list[Answer]:
        """Returns the kept answers of the batch that begins at `start`, or asks the model."""
        prompts = [request.args[0] for request in requests]
        found = self.kept.find(start, prompts) if self.kept else None
        if found is not None:
            return found
        answers = self._batch(start, requests)
        if self.kept:
            self.kept.keep(start, prompts, answers)
        return answers

    @torch.inference_mode()
    def _batch(self, start: int, requests: Sequence[Instance]) -> list[Answer]:
        settings = requests[0].args[1]  # the task has one set of them
        names = [request.doc["question_id"] for request in requests]
        inputs = self.loaded.encode_prompts(
            [request.args[0] for request in requests], [_decode(request) for request in requests]
        )
        options: dict[str, Any] = {
            "do_sample": settings["do_sample"],
            "pad_token_id": self.loaded.tokenizer.pad_token_id,
        }
        if settings["do_sample"]:  # samples from the whole distribution, without top-k or top-p
            torch.manual_seed(self.seed + start)
            options |= {"temperature": settings["temperature"], "top_k": 0, "top_p": 1.0}

        def options_of(rows: list[int]) -> dict[str, Any]:
            check = _RefuseNonFinite(self.loaded.name, [names[row] for row in rows])
            return {**options, "logits_processor": LogitsProcessorList([check])}

        eos = self.loaded.tokenizer.eos_token_id
        generated = decode(self.loaded.model, inputs, settings["max_gen_toks"], eos, options_of)
        ended = (generated == eos).any(1)
        cut = (~ended).tolist() if generated.shape[1] == settings["max_gen_toks"] else []
        texts = self.loaded.decode(generated)
        return [Answer(*pair) for pair in zip(texts, cut or [False] * len(texts), strict=True)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Scores each request's continuation after its context.

        Returns:
            For each request the log-probability of the continuation in nats, and whether each of
            its tokens is the most likely one.

        Raises:
            UserError: If a text with an image, or a continuation, does not fit the context.
            RunError: If a log-probability is not finite.
        """
        passages = [
            likelihood.continuation(
                self.loaded, request.args[0], request.args[1], _encoded_image(request)
            )
            for request in requests
        ]
        found = self._score(passages, requests)
        return [(each.log_probability, each.greedy) for each in found]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Scores whole texts, in windows of the model's context if they are longer.

        Returns:
            Log-probability of each text after the bos token, in nats.

        Raises:
            RunError: If a log-probability is not finite.
        """
        passages: list[Passage] = []
        owners: list[int] = []
        for row, request in enumerate(requests):
            parts = likelihood.windows(self.loaded, request.args[0])
            passages += parts
            owners += [row] * len(parts)
        sums = [0.0] * len(requests)
        found = self._score(passages, [requests[row] for row in owners])
        for row, each in zip(owners, found, strict=True):
            sums[row] += each.log_probability
        return sums

    def _score(self, passages: Sequence[Passage], requests: Sequence[Instance]) -> list[Likelihood]:
        """Scores the passages of requests on all ranks, in their order."""
        parts = list(likelihood.batches(passages, self.batch_size))
        work = [[(passages[row], requests[row]) for row in rows] for rows in parts]
        ranks = run_on_all_ranks(InMemoryModel._score_on_rank, self, work, WorkQueue(len(work)))
        scored = {number: batch for rank in ranks for number, batch in rank.items()}
        found = {
            row: each
            for number, rows in enumerate(parts)
            for row, each in zip(rows, scored[number], strict=True)
        }
        return [found[row] for row in range(len(passages))]

    def _score_on_rank(
        self, work: Sequence[Sequence[tuple[Passage, Instance]]], queue: WorkQueue
    ) -> dict[int, list[Likelihood]]:
        """Scores the batches that this rank takes; images are decoded when their batch runs."""
        scored = {}
        with queue as numbers:
            for number in numbers:
                batch = [
                    replace(passage, image=_decode(request)) if passage.image else passage
                    for passage, request in work[number]
                ]
                scored[number] = likelihood.score(self.loaded, batch)
                for each, (_, request) in zip(scored[number], work[number], strict=True):
                    if not isfinite(each.log_probability):
                        raise _not_finite(self.loaded.name, f"text of {_name(request)}")
        return scored


class _RefuseNonFinite(LogitsProcessor):
    """Stops generation at a NaN, which argmax would silently turn into an arbitrary token."""

    def __init__(self, model: str, questions: Sequence[str]) -> None:
        self.model = model
        self.questions = questions

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns the logits [batch, vocabulary] unchanged, or raises RunError."""
        finite = scores.amax(dim=-1).isfinite()  # amax propagates NaN and ignores a masked -inf
        if not finite.all():
            question = self.questions[int(finite.logical_not().nonzero()[0])]
            raise _not_finite(self.model, f"question {question}")
        return scores


def _not_finite(model: str, what: str) -> RunError:
    return RunError(
        f"model {model}: the logits for {what} are not finite; check its weights for NaN or Inf "
        "and the scales of its quantized layers"
    )


def _count_right(requests: Sequence[Instance], answers: Sequence[Answer]) -> int:
    pairs = zip(requests, answers, strict=True)
    return sum(score(r.doc, [answer.text])["predictions"]["correct"] for r, answer in pairs)


def _size(request: Instance) -> tuple[bool, int]:
    context, _, extra = request.args
    return bool(extra["visual"]), len(context)


def _name(request: Instance) -> str:
    """The id of a request's question, or its number where a task has no ids."""
    return str(request.doc.get("question_id", request.doc_id))


def _encoded_image(request: Instance) -> Any:
    """The image of a request as lm-eval passes it, or None."""
    images = request.args[2]["visual"] if len(request.args) > 2 else []
    return images[0] if images else None


def _decode(request: Instance) -> Image | None:
    """Decodes the image of a request to RGB. An image that is decoded already stays as it is."""
    image = _encoded_image(request)
    if image is None:
        return None
    try:
        return _IMAGE.decode_example(image)
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for broken files
        raise UserError(
            f"data: the image of question {_name(request)} does not decode. Give a "
            "complete file in a format that Pillow reads, such as PNG or JPEG"
        ) from error

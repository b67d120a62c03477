"""An lm-eval model that wraps a model in memory: batched generation and log-likelihoods.

lm-eval's own multimodal wrapper needs a processor that is loaded by name, and it fails on a batch
without an image and on multiple choice with images. This adapter encodes exactly the context and
the images that lm-eval passes to it, and serves every type of request, with images or without.

Ranks take whole batches from a shared work queue (`qvlm.runtime.workers`). Batches do not depend on
the number of ranks, so neither padding nor answers do. lm-eval itself sees a single process.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Protocol

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LogitsProcessorList

from qvlm.evaluation import likelihood
from qvlm.evaluation.answers import Answer, KeptAnswers
from qvlm.evaluation.decoding import RefuseNonFinite, decode, not_finite
from qvlm.evaluation.likelihood import Likelihood, Passage
from qvlm.evaluation.metrics import wilson
from qvlm.evaluation.request import (
    Generation,
    alike,
    context,
    continuation,
    encoded_images,
    images,
    name,
)
from qvlm.evaluation.task import score
from qvlm.models.loaded import LoadedModel
from qvlm.runtime.workers import WorkQueue, is_rank_zero, run_on_all_ranks


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
        shorten: Whether a text that does not fit the model's context loses its beginning, with a
            warning, as in lm-eval. Otherwise it is refused. One with an image is always refused.

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
        shorten: bool = True,
    ) -> None:
        super().__init__()
        self.loaded = loaded
        self.batch_size = batch_size
        self.seed = seed
        self.kept = kept
        self.progress = progress
        self.observe = observe
        self.watch = watch
        self.shorten = shorten
        self.ranks: list[RankAnswers] = []
        self.cut: list[bool] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what only rank 0 needs, so that the other ranks can be sent the rest."""
        return {**self.__dict__, "watch": None}

    @property
    def tokenizer_name(self) -> str:
        """Name under which lm-eval caches what it makes with the chat template."""
        return self.loaded.name

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Returns the name of the conversation template, which lm-eval records."""
        return self.loaded.prompting.conversation if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns the text of a conversation in the template of the checkpoint."""
        return self.loaded.prompting.chat(chat_history, add_generation_prompt)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generates one text per request, in the order of the requests; see `request.alike`.

        A batch generates no more tokens than its longest prompt leaves of the context.

        Raises:
            UserError: If settings are not supported, or a prompt leaves no room for an answer.
            RunError: If logits are not finite.
        """
        if self.shorten:
            self._warn(sum(map(self._is_shortened, requests)), len(requests))
        rows = alike(requests, self.batch_size)
        batches = {start: [requests[row] for row in batch] for start, batch in rows.items()}
        self.ranks = run_on_all_ranks(
            InMemoryModel._on_rank, self, batches, WorkQueue(len(batches))
        )
        answers = {
            row: answer
            for rank in self.ranks
            for start, given in rank.answers.items()
            for row, answer in zip(rows[start], given, strict=True)
        }
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
        prompts = [context(request, self.loaded.image_token) for request in requests]
        found = self.kept.find(start, prompts) if self.kept else None
        if found is not None:
            return found
        answers = self._batch(start, requests)
        if self.kept:
            self.kept.keep(start, prompts, answers)
        return answers

    @torch.inference_mode()
    def _batch(self, start: int, requests: Sequence[Instance]) -> list[Answer]:
        settings = Generation.of(requests[0])  # those of all requests of a batch
        limit, tokenizer = settings.max_new_tokens, self.loaded.tokenizer
        marks = self._marks(settings)
        prompts = [context(request, self.loaded.image_token) for request in requests]
        pictures = [images(request) for request in requests]
        rows = self.loaded.token_ids(prompts, pictures)
        rows = [ids or [likelihood.prefix(self.loaded)] for ids in rows]
        if self.shorten:
            rows = [
                ids if own else likelihood.shortened(self.loaded, ids, limit)
                for ids, own in zip(rows, pictures, strict=True)
            ]
        rooms = [
            likelihood.room_for_answer(self.loaded, len(ids), limit, f"question {name(request)}")
            for ids, request in zip(rows, requests, strict=True)
        ]
        if len(set(rooms)) > 1:
            return self._in_parts(start, requests, rooms)
        limit = rooms[0]
        inputs = self.loaded.collate(rows, pictures)
        if settings.sampling["do_sample"]:
            torch.manual_seed(self.seed + start)

        def options_of(rows: list[int]) -> dict[str, Any]:
            check = RefuseNonFinite(self.loaded.name, [name(requests[row]) for row in rows])
            return {
                **settings.sampling,
                "pad_token_id": tokenizer.pad_token_id,
                "logits_processor": LogitsProcessorList([check]),
            }

        def ended(new: Tensor) -> Tensor:
            """Whether each row of new tokens [rows, tokens] holds a text that ends it, [rows]."""
            ends = [settings.ended(text) for text in self.loaded.decode(new, marks)]
            return torch.tensor(ends, device=new.device)

        eos = tokenizer.eos_token_id
        generated = decode(
            self.loaded.model, inputs, limit, eos, options_of, ended if settings.until else None
        )
        texts = self.loaded.decode(generated, marks)
        full = (generated != eos).all(1) & (generated.shape[1] == limit)
        return [
            Answer(_without(settings.cut(text), marks), reached and not settings.ended(text))
            for text, reached in zip(texts, full.tolist(), strict=True)
        ]

    def _in_parts(
        self, start: int, requests: Sequence[Instance], rooms: Sequence[int]
    ) -> list[Answer]:
        """Asks the requests of equal room together, so that no answer is cut for its neighbors."""
        answers: dict[int, Answer] = {}
        for room in sorted(set(rooms)):
            rows = [row for row, own in enumerate(rooms) if own == room]
            given = self._batch(start, [requests[row] for row in rows])
            answers |= zip(rows, given, strict=True)
        return [answers[row] for row in range(len(requests))]

    def _marks(self, settings: Generation) -> dict[int, str]:
        """The special tokens by id that stand in a text that ends an answer, such as <|im_end|>."""
        special = self.loaded.special_tokens
        return {at: text for at, text in special.items() if any(text in e for e in settings.until)}

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Scores each request's continuation after its context.

        Returns:
            For each request the log-probability of the continuation in nats, and whether each of
            its tokens is the most likely one.

        Raises:
            UserError: If a continuation, or a text that is not to be shortened, does not fit the
                context.
            RunError: If a log-probability is not finite.
        """
        passages = [self._continuation(request) for request in requests]
        self._warn(sum(passage.lost > 0 for passage in passages), len(passages))
        found = self._score(passages, requests)
        return [(each.log_probability, each.greedy) for each in found]

    def _continuation(self, request: Instance) -> Passage:
        """Makes the passage of a request, whose images stay encoded until its batch runs."""
        encoded = encoded_images(request)
        passage = likelihood.continuation(
            self.loaded,
            context(request, self.loaded.image_token),
            continuation(request, self.loaded.image_token),
            images(request) if self.loaded.image_tokens_vary else encoded,
            f"question {name(request)}",
            self.shorten,
        )
        return replace(passage, images=encoded)

    def _is_shortened(self, request: Instance) -> bool:
        """Whether the prompt of a request is cut to leave room for an answer."""
        if encoded_images(request):
            return False
        (ids,) = self.loaded.token_ids([context(request, self.loaded.image_token)], [[]])
        limit = Generation.of(request).max_new_tokens
        return len(likelihood.shortened(self.loaded, ids, limit)) < len(ids)

    def _warn(self, shortened: int, total: int) -> None:
        """Warns if texts lose their beginning."""
        if shortened:
            warnings.warn(
                f"model {self.loaded.name}: {shortened} of {total} texts do not fit its context of "
                f"{likelihood.context_length(self.loaded)} tokens with their answers and lose "
                "tokens at their beginning",
                RuntimeWarning,
                stacklevel=3,
            )

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
                    replace(passage, images=images(request)) if passage.images else passage
                    for passage, request in work[number]
                ]
                scored[number] = likelihood.score(self.loaded, batch)
                for each, (_, request) in zip(scored[number], work[number], strict=True):
                    if not isfinite(each.log_probability):
                        raise not_finite(self.loaded.name, f"text of {name(request)}")
        return scored


def _without(text: str, marks: Mapping[int, str]) -> str:
    for mark in marks.values():
        text = text.replace(mark, "")
    return text


def _count_right(requests: Sequence[Instance], answers: Sequence[Answer]) -> int:
    pairs = zip(requests, answers, strict=True)
    return sum(score(r.doc, [answer.text])["predictions"]["correct"] for r, answer in pairs)

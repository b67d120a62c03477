"""lm-eval's view of a model that is already in memory: batched generation, nothing else.

lm-eval's own wrappers load a checkpoint by name and fail on a batch without an image; a model that
was quantized a minute ago has no name. The adapter encodes exactly the context and the image that
lm-eval hands over. It offers no log-likelihoods, because ScienceQA's official score comes from the
generated text.

With several processes (`qvlm.processes`) the batches are dealt out, each as it is: which questions
are padded together, and so every answer, is the same with any number of them. lm-eval, which would
deal out questions, sees one process.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import datasets
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from PIL.Image import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from qvlm.errors import RunError, UserError
from qvlm.evaluation.answers import KeptAnswers
from qvlm.models.loaded import LoadedModel
from qvlm.runtime.workers import Deal, everywhere, is_first

_IMAGE = datasets.Image(mode="RGB")


@dataclass(frozen=True)
class Share:
    """What one process contributed.

    Attributes:
        answers: by the number of their batch.
        resumed: how many of them were kept before.
        observed: what `observe` said.
    """

    answers: dict[int, list[str]]
    resumed: int
    observed: Any


class InMemoryModel(LM):
    """Wraps a `LoadedModel` for lm-eval.

    Args:
        loaded: the model with its encoding.
        batch_size: questions per batch.
        seed: of sampling; each batch has a seed of its own that follows from it.
        kept: answers of an earlier evaluation, and where to keep these.
        progress: one bar over the questions; silent anyway when stderr is no terminal.
        observe: looks at the model of each process when all questions are answered.

    Attributes:
        shares: of each process, once the questions are answered.
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
    ) -> None:
        super().__init__()
        self.loaded = loaded
        self.batch_size = batch_size
        self.seed = seed
        self.kept = kept
        self.progress = progress
        self.observe = observe
        self.shares: list[Share] = []

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generates one text per request, in the order of the requests.

        The batches go from long to short, those with images first: little padding, no vision tower
        for the rest, and a batch too large for the memory fails at once rather than at the end.
        """
        longest_first = sorted(range(len(requests)), key=lambda row: _size(requests[row]))[::-1]
        batches = {
            start: [requests[row] for row in longest_first[start : start + self.batch_size]]
            for start in range(0, len(requests), self.batch_size)
        }
        self.shares = everywhere(InMemoryModel._share, self, batches, Deal(len(batches)))
        given = {start: texts for share in self.shares for start, texts in share.answers.items()}
        texts = [""] * len(requests)
        for row, text in zip(longest_first, _in_order(given), strict=True):
            texts[row] = text
        return texts

    def _share(self, batches: Mapping[int, Sequence[Instance]], deal: Deal) -> Share:
        """Answers the batches that are dealt to this process; the bar shows what all are at."""
        starts = list(batches)
        answers = {}
        with (
            tqdm(
                total=sum(map(len, batches.values())),
                desc=f"{self.loaded.name}: questions",
                unit="q",
                disable=None if self.progress and is_first() else True,
            ) as bar,
            deal as numbers,
        ):
            for start in map(starts.__getitem__, numbers):
                bar.update(start - bar.n)
                answers[start] = self._answers(start, batches[start])
            bar.update(bar.total - bar.n)
        observed = self.observe(self.loaded.model) if self.observe else None
        return Share(answers, self.kept.resumed if self.kept else 0, observed)

    def _answers(self, start: int, requests: Sequence[Instance]) -> list[str]:
        """The answers of the batch that begins at `start`, from the model unless they are kept."""
        prompts = [request.args[0] for request in requests]
        found = self.kept.find(start, prompts) if self.kept else None
        if found is not None:
            return found
        answers = self._batch(start, requests)
        if self.kept:
            self.kept.keep(start, prompts, answers)
        return answers

    @torch.inference_mode()
    def _batch(self, start: int, requests: Sequence[Instance]) -> list[str]:
        settings = requests[0].args[1]  # the task has one set of them
        names = [request.doc["question_id"] for request in requests]
        inputs = self.loaded.encode_prompts(
            [request.args[0] for request in requests], [_decode(request) for request in requests]
        )
        options: dict[str, Any] = {
            **inputs,
            "max_new_tokens": settings["max_gen_toks"],
            "do_sample": settings["do_sample"],
            "eos_token_id": self.loaded.tokenizer.eos_token_id,
            "pad_token_id": self.loaded.tokenizer.pad_token_id,
            "logits_processor": LogitsProcessorList([_RefuseNonFinite(self.loaded.name, names)]),
        }
        if settings["do_sample"]:  # from the distribution itself, without a default cut-off
            torch.manual_seed(self.seed + start)
            options |= {"temperature": settings["temperature"], "top_k": 0, "top_p": 1.0}
        model: Any = self.loaded.model  # the types of `generate` do not admit a subclass of ours
        generated = model.generate(**options)
        return self.loaded.decode(generated[:, inputs["input_ids"].shape[1] :])

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        """Not offered: see the module's docstring."""
        raise NotImplementedError("this adapter generates text; it scores no continuations")

    def loglikelihood_rolling(self, requests: list[Instance]) -> NoReturn:
        """Not offered: see the module's docstring."""
        raise NotImplementedError("this adapter generates text; it scores no texts")


def _in_order(answers: Mapping[int, Sequence[str]]) -> list[str]:
    return [text for start in sorted(answers) for text in answers[start]]


class _RefuseNonFinite(LogitsProcessor):
    """Stops generation at a NaN, which the argmax would silently turn into some token."""

    def __init__(self, model: str, questions: Sequence[str]) -> None:
        self.model = model
        self.questions = questions

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns the logits [batch, vocabulary] unchanged, or raises RunError."""
        finite = scores.amax(dim=-1).isfinite()  # the largest: NaN spreads, a masked -inf does not
        if not finite.all():
            question = self.questions[int(finite.logical_not().nonzero()[0])]
            raise RunError(
                f"model {self.model}: the logits for question {question} are not finite; check "
                "its weights for NaN or Inf and the scales of its quantized layers"
            )
        return scores


def _size(request: Instance) -> tuple[bool, int]:
    context, _, extra = request.args
    return bool(extra["visual"]), len(context)


def _decode(request: Instance) -> Image | None:
    """The image of a request in RGB; `datasets` leaves one that is decoded already as it is."""
    images = request.args[2]["visual"]
    if not images:
        return None
    try:
        return _IMAGE.decode_example(images[0])
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for broken files
        raise UserError(
            f"data: the image of question {request.doc['question_id']} does not decode; accepted "
            "are whole files in a format that Pillow reads, such as PNG or JPEG"
        ) from error

"""Batched decoding in which finished rows leave the batch.

Transformers' `generate` computes every row until the longest answer of a batch ends. Here it is
stopped when some of the rows have finished, these leave the batch and its key-value cache, and it
goes on with the others. A row's tokens do not depend on the other rows, except through rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList

from qvlm.errors import RunError
from qvlm.models.cache import CACHE, growing_cache

# Share of the rows that must have finished before they leave, because selecting rows of the cache
# and starting anew costs about as much as a few tokens.
LEAVING = 0.25


class _SomeFinished(StoppingCriteria):
    """Stops all rows once at least `LEAVING` of them have finished.

    Args:
        prompt: Number of tokens before the new ones.
        eos: Token that ends an answer.
        ended: Function from new tokens [rows, tokens] to whether each row has ended, [rows], for
            other ends than that token.
    """

    def __init__(self, prompt: int, eos: int, ended: Callable[[Tensor], Tensor] | None) -> None:
        self.prompt = prompt
        self.eos = eos
        self.ended = ended

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Returns for each row of [rows, tokens] whether it stops, [rows]."""
        enough = self.finished(input_ids).float().mean() >= LEAVING
        return enough.expand(len(input_ids))

    def finished(self, sequences: Tensor) -> Tensor:
        """Returns for each row of [rows, tokens] whether it has finished, [rows]."""
        new = sequences[:, self.prompt :]
        finished = (new == self.eos).any(1)
        return finished if self.ended is None else finished | self.ended(new)


def decode(
    model: Any,
    inputs: Mapping[str, Tensor],
    limit: int,
    eos: int,
    options: Callable[[list[int]], Mapping[str, Any]],
    ended: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Generates the tokens of every row.

    Args:
        model: Model with transformers' `generate`.
        inputs: Batch of left-padded prompts, as `LoadedModel.encode_prompts` makes it.
        limit: Largest number of new tokens of a row.
        eos: Token that ends an answer.
        options: Function from the rows that are still in the batch to further arguments of
            `generate`, among them `pad_token_id`.
        ended: Function from the new tokens of rows [rows, tokens] to whether they end each row,
            [rows], if more than the token `eos` can.

    Returns:
        New tokens [rows, tokens], the longest answer first to fit; shorter ones are padded.
    """
    rows = list(range(len(inputs["input_ids"])))
    parts: list[tuple[list[int], Tensor]] = []
    left, batch, cache = limit, dict(inputs), growing_cache(model)
    stop = _SomeFinished(inputs["input_ids"].shape[1], eos, ended)
    pad = options(rows)["pad_token_id"]
    while rows:
        made = model.generate(
            **batch,
            **options(rows),
            **{CACHE: cache},
            max_new_tokens=left,
            eos_token_id=eos,
            stopping_criteria=StoppingCriteriaList([stop]),
            return_dict_in_generate=True,
        )
        new = made.sequences[:, batch["input_ids"].shape[1] :]
        parts.append((rows, new))
        left -= new.shape[1]
        going = (~stop.finished(made.sequences)).nonzero()[:, 0] if left else new.new_empty(0)
        rows = [rows[index] for index in going.tolist()]
        if rows:
            cache = made[CACHE]
            cache.batch_select_indices(going)
            _select_offsets(model, going)
            mask = torch.cat([batch["attention_mask"], torch.ones_like(new)], dim=1)
            batch = {"input_ids": made.sequences[going], "attention_mask": mask[going]}
    answers = inputs["input_ids"].new_full((len(inputs["input_ids"]), limit - left), pad)
    begin = 0
    for indices, new in parts:
        answers[indices, begin : begin + new.shape[1]] = new
        begin += new.shape[1]
    return answers


class RefuseNonFinite(LogitsProcessor):
    """Stops generation at a NaN, which argmax would silently turn into an arbitrary token.

    Args:
        model: Name of the model.
        questions: Names of the questions, in the order of the rows.
    """

    def __init__(self, model: str, questions: Sequence[str]) -> None:
        self.model = model
        self.questions = questions

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns the logits [batch, vocabulary] unchanged, or raises RunError."""
        finite = scores.amax(dim=-1).isfinite()  # amax propagates NaN and ignores a masked -inf
        if not finite.all():
            question = self.questions[int(finite.logical_not().nonzero()[0])]
            raise not_finite(self.model, f"question {question}")
        return scores


def not_finite(model: str, what: str) -> RunError:
    """Makes the error for logits that are not finite."""
    return RunError(
        f"model {model}: the logits for {what} are not finite; check its weights for NaN or Inf "
        "and the scales of its quantized layers"
    )


def _select_offsets(model: Any, rows: Tensor) -> None:
    """Keeps the offsets of the rows that stay, where a model with M-RoPE remembers them.

    They are the differences between the positions and the numbers of tokens behind a picture.
    """
    inner: Any = getattr(model, "base_model", None)
    if (offsets := getattr(inner, "rope_deltas", None)) is not None:
        inner.rope_deltas = offsets[rows]

"""What a model thinks of given texts: log-likelihoods, and the states that its logits come from.

A `Passage` is a text of which the last tokens are scored. Everything that teacher-forces a model is
made of passages: a continuation after a context, a document in windows, the answer to a problem.
lm-eval's conventions hold: blanks at the end of a context belong to the continuation, a text
without context follows the bos token, and what is longer than the model's context loses tokens at
its beginning.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor, nn

from qvlm.errors import UserError
from qvlm.models.loaded import LoadedModel


@dataclass(frozen=True)
class Passage:
    """A text of which the last tokens are scored.

    Attributes:
        ids: Token ids, at least one more than are scored.
        scored: Number of tokens at the end that are scored.
        images: Images at the positions of the image token. They are decoded by the time that the
            passage is scored.
        lost: Number of tokens that were cut off at the beginning.
    """

    ids: list[int]
    scored: int
    images: Sequence[Any] = ()
    lost: int = 0


@dataclass(frozen=True)
class Likelihood:
    """What a model thinks of the scored tokens of a passage.

    Attributes:
        log_probability: Sum of the log-probabilities of the scored tokens, in nats.
        greedy: Whether each scored token is the most likely one.
    """

    log_probability: float
    greedy: bool


def continuation(
    loaded: LoadedModel,
    context: str,
    text: str,
    images: Sequence[Any] = (),
    what: str = "a text",
    shorten: bool = True,
) -> Passage:
    """Makes the passage of a continuation after a context.

    Args:
        loaded: Model that the passage is for.
        context: Text before it, with one `<image>` for each image. It may be empty.
        text: Continuation, which is scored.
        images: Images of the context.
        what: What the texts belong to, for an error.
        shorten: Whether a text without images that is too long loses its beginning.

    Raises:
        ValueError: If the texts do not hold exactly one `<image>` for each image.
        UserError: If the continuation has no token of its own, or the model's context is too short
            for it, or for a text that must not be shortened.
    """
    bare = context.rstrip()
    whole, before = loaded.token_ids([context + text, bare], [images, images])
    if not before or len(whole) < 2:  # of a tokenizer that begins without a bos token
        whole, before = [prefix(loaded), *whole], [prefix(loaded), *before]
    scored = len(whole) - len(before)
    if scored < 1 and text.strip():
        raise UserError(
            f"model {loaded.name}: {what} has a continuation, {text[:80]!r}, whose tokens are one "
            "with the last word of its context, so it has no likelihood of its own. Begin it with "
            "a blank or a line."
        )
    longest = context_length(loaded) + 1  # the last token is predicted and never read
    if len(whole) <= longest:
        return Passage(whole, scored, images)
    if images or not shorten or scored >= longest:
        raise UserError(_too_long(loaded, len(whole), what))
    return Passage(whole[-longest:], scored, lost=len(whole) - longest)


def windows(loaded: LoadedModel, text: str, length: int | None = None) -> list[Passage]:
    """Divides a text into passages in which each of its tokens is scored once.

    Args:
        loaded: Model that the passages are for.
        text: Text of any length, without an image.
        length: Number of tokens in a window. None stands for the model's whole context.
    """
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    longest = length or context_length(loaded)
    parts = get_rolling_token_windows(ids, prefix(loaded), longest, context_len=1)
    return [
        Passage([*before, *scored], len(scored))
        for before, scored in map(make_disjoint_window, parts)
    ]


def context_length(loaded: LoadedModel) -> int:
    """Returns the number of positions that the language model was made for."""
    return int(loaded.model.config.get_text_config().max_position_embeddings)


def shortened(loaded: LoadedModel, ids: list[int], new_tokens: int) -> list[int]:
    """Returns the end of a prompt that leaves room for an answer, as lm-eval's own models keep it.

    Args:
        loaded: Model that answers.
        ids: Token ids of a prompt without an image.
        new_tokens: Largest number of tokens of the answer. If these alone may fill the context,
            nothing is cut.
    """
    kept = context_length(loaded) - new_tokens
    return ids[-kept:] if kept > 0 else ids


def room_for_answer(loaded: LoadedModel, prompt: int, new_tokens: int, what: str) -> int:
    """Returns how many tokens may follow a prompt, so that none is read beyond the context.

    Args:
        loaded: Model that answers.
        prompt: Number of tokens of the prompt, images included.
        new_tokens: Largest number of tokens of an answer to a shorter prompt.
        what: What the prompt belongs to, for an error.

    Raises:
        UserError: If the prompt leaves no room for a token of the answer.
    """
    room = context_length(loaded) + 1 - prompt  # the last token is never read
    if room < 1:
        raise UserError(_too_long(loaded, prompt, what))
    return min(room, new_tokens)


def score(loaded: LoadedModel, passages: Sequence[Passage]) -> list[Likelihood]:
    """Scores one batch of passages, in their order."""
    found = []
    for passage, logits in zip(passages, logits_of(loaded, passages), strict=True):
        targets = torch.tensor(passage.ids[len(passage.ids) - passage.scored :])
        targets = targets.to(logits.device)
        log_probabilities = log_softmax(logits).gather(1, targets[:, None])
        greedy = bool((logits.argmax(1) == targets).all())
        found.append(Likelihood(float(log_probabilities.sum()), greedy))
    return found


def log_softmax(logits: Tensor) -> Tensor:
    """Returns log-probabilities [..., vocabulary], in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


@torch.inference_mode()
def logits_of(loaded: LoadedModel, passages: Sequence[Passage]) -> list[Tensor]:
    """Returns the logits [scored, vocabulary] that predict the scored tokens of each passage."""
    model: Any = loaded.model
    inputs = _inputs(loaded, passages)
    kept = max(passage.scored for passage in passages)
    logits = model(**inputs, logits_to_keep=max(kept, 1)).logits
    return _last(logits, passages)


@torch.inference_mode()
def states_of(loaded: LoadedModel, passages: Sequence[Passage]) -> list[Tensor]:
    """Returns the states [scored, width] that the output head makes those logits of."""
    inputs = _inputs(loaded, passages)
    states = loaded.model.base_model(**inputs).last_hidden_state
    return _last(states, passages)


def output_head(loaded: LoadedModel) -> nn.Module:
    """Returns the layer that turns states [..., width] into logits [..., vocabulary]."""
    head = loaded.model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    return head


def batches(passages: Sequence[Passage], batch_size: int) -> Iterator[list[int]]:
    """Yields the indices of the passages of each batch, from long to short, images first.

    A batch of equal lengths has little padding, and one that does not fit in memory fails at the
    beginning.
    """
    longest_first = sorted(
        range(len(passages)),
        key=lambda row: (bool(passages[row].images), len(passages[row].ids)),
        reverse=True,
    )
    for start in range(0, len(passages), batch_size):
        yield longest_first[start : start + batch_size]


def prefix(loaded: LoadedModel) -> int:
    """Returns the token that the first token of a text follows."""
    tokenizer = loaded.tokenizer
    bos = tokenizer.bos_token_id
    return int(tokenizer.eos_token_id if bos is None else bos)


def _too_long(loaded: LoadedModel, tokens: int, what: str) -> str:
    return (
        f"model {loaded.name}: {what} has {tokens} tokens and does not fit its context of "
        f"{context_length(loaded)}. Shorten it or leave it out."
    )


def _inputs(loaded: LoadedModel, passages: Sequence[Passage]) -> dict[str, Any]:
    """The batch of a forward pass, with positions that padding does not count in."""
    rows = [passage.ids[:-1] for passage in passages]
    inputs: dict[str, Any] = loaded.collate(rows, [passage.images for passage in passages])
    return {**inputs, **loaded.positions(inputs["attention_mask"]), "use_cache": False}


def _last(values: Tensor, passages: Sequence[Passage]) -> list[Tensor]:
    """The last positions of each row of values [batch, tokens, width], as many as are scored."""
    length = values.shape[1]
    return [row[length - passage.scored :] for row, passage in zip(values, passages, strict=True)]

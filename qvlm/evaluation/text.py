"""How well a language model predicts plain text, alone and beside the model in full precision.

Every token of every document is scored once, given the tokens before it in its window. The windows
are those of `loglikelihood_rolling` (`likelihood.windows`): the first one of a document begins with
the tokenizer's bos token, and windows do not overlap. Three measures per token, in the order of
what they need:

- the negative log-likelihood in nats, whose mean's exponential is the perplexity;
- KL(p || q) in nats, where p is the next-token distribution in full precision and q the model's;
- whether both find the same token most likely.

Tokens of one document depend on each other. Intervals therefore treat documents as clusters.

What the model in full precision makes of the windows is kept for all cells (see `states`), as
`divergence.Reference` keeps it for the answers to problems.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from qvlm.data.text import Document
from qvlm.errors import RunError
from qvlm.evaluation import likelihood
from qvlm.evaluation.divergence import kl
from qvlm.evaluation.evaluator import Evaluation
from qvlm.evaluation.likelihood import Passage
from qvlm.evaluation.states import SavedStates, kept_states
from qvlm.evaluation.text_metrics import summarize
from qvlm.models.loaded import LoadedModel

# Number of positions whose logits are computed at a time, which bounds memory.
_POSITIONS = 64


@dataclass(frozen=True)
class Window:
    """A stretch of a document that is read at once.

    Attributes:
        document: Name of the document.
        passage: Tokens that are read, of which the last ones are scored.
    """

    document: str
    passage: Passage

    @property
    def targets(self) -> Tensor:
        """The token ids that are scored, [scored]."""
        return torch.tensor(self.passage.ids[len(self.passage.ids) - self.passage.scored :])


def windows_of(loaded: LoadedModel, documents: Sequence[Document], length: int) -> list[Window]:
    """Cuts documents into windows.

    Args:
        loaded: Model with its tokenizer.
        documents: Documents, of which each token is scored in one window.
        length: Largest number of tokens that a window reads.
    """
    return [
        Window(document.name, passage)
        for document in documents
        for passage in likelihood.windows(loaded, document.text, length)
    ]


@torch.inference_mode()
def refer(loaded: LoadedModel, windows: Sequence[Window], file: Path | None = None) -> SavedStates:
    """Runs a model in full precision, or reads what it gave before.

    Args:
        loaded: Model in full precision.
        windows: Windows to score.
        file: File that keeps the states for other cells. Its name has to identify the model and
            the windows.
    """

    def compute() -> list[Tensor]:
        return [part.clone() for part in _states(loaded, windows, "full precision")]

    return kept_states(loaded, file, compute)


@torch.inference_mode()
def evaluate_text(
    loaded: LoadedModel,
    windows: Sequence[Window],
    reference: SavedStates | None = None,
    observe: Callable[[nn.Module], Any] | None = None,
    is_reference: bool = False,
) -> Evaluation:
    """Scores every token of the windows.

    Args:
        loaded: Model with its tokenizer.
        windows: Windows, from `windows_of`.
        reference: The same windows in full precision; None measures no distance to it.
        observe: Function that is called with the model at the end.
        is_reference: Whether the model is the one that gave the reference. It is not run again, and
            no distance is measured.

    Returns:
        Evaluation whose metrics have the one key `text` (see `summarize`). Its predictions have a
        row per document with the columns `document`, `tokens`, and the sums `nll` and, with a
        reference, `kl` and `agreement`.

    Raises:
        RunError: If logits are not finite.
    """
    rows: dict[str, dict[str, Any]] = {}
    all_states: Iterable[Tensor] = _states(loaded, windows, loaded.name)
    distance_to = None if is_reference else reference
    if is_reference and reference is not None:
        all_states = (part.to(_head(loaded)) for part in reference.states)
    for number, (window, states) in enumerate(zip(windows, all_states, strict=True)):
        targets = window.targets.to(states.device)
        sums = rows.setdefault(window.document, {"document": window.document, "tokens": 0})
        sums["tokens"] += len(targets)
        for start in range(0, len(targets), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            logits = likelihood.output_head(loaded)(states[part])
            scores = likelihood.log_softmax(logits).gather(1, targets[part, None])
            found = {"nll": -float(scores.double().sum())}
            if distance_to is not None:
                wanted = distance_to.logits(number, states, part)
                found["kl"] = float(kl(wanted, logits).sum())
                found["agreement"] = float((wanted.argmax(1) == logits.argmax(1)).sum())
            for name, value in found.items():
                if not isfinite(value):
                    raise RunError(
                        f"model {loaded.name}: the logits for document {window.document} are not "
                        "finite; check its weights and the scales of its quantized layers"
                    )
                sums[name] = sums.get(name, 0.0) + value
    table = pd.DataFrame(rows.values())
    observed = [observe(loaded.model)] if observe else []
    return Evaluation({"text": summarize(table)}, table, 0, [len(windows)], observed)


def _states(loaded: LoadedModel, windows: Sequence[Window], label: str) -> Iterator[Tensor]:
    """The last hidden states at the positions of each window's targets, [targets, width]."""
    for window in tqdm(windows, desc=f"{label}: windows", unit="w", leave=False, disable=None):
        yield likelihood.states_of(loaded, [window.passage])[0]


def _head(loaded: LoadedModel) -> Tensor:
    weight = likelihood.output_head(loaded).weight
    assert isinstance(weight, Tensor)
    return weight

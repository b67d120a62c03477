"""How far a quantized model is from the model that it was made of, token by token.

Accuracy sees a difference only where an answer changes. The Kullback-Leibler divergence of the
next-token distribution, KL(full precision || quantized), sees every token and ranks methods on a
few hundred problems. Both models read the same text, the expected answer, so that their
distributions can be compared token by token (teacher forcing). What is kept of the float model is
in `states`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from qvlm.errors import RunError
from qvlm.evaluation import likelihood
from qvlm.evaluation.likelihood import Passage, log_softmax
from qvlm.evaluation.metrics import ratio
from qvlm.evaluation.states import kept_states
from qvlm.models.loaded import LoadedModel


@dataclass(frozen=True)
class Divergence:
    """How far one model is from another on some passages.

    Attributes:
        nats: Sum of the divergence over the scored tokens of each passage, [passages].
        agreeing: Number of scored tokens for which both models find the same token most likely,
            [passages].
        tokens: Number of scored tokens, [passages].
    """

    nats: NDArray[np.float64]
    agreeing: NDArray[np.int64]
    tokens: NDArray[np.int64]

    def summary(self, clusters: ArrayLike | None = None) -> dict[str, float | int]:
        """Returns the means per token, with their standard errors.

        Args:
            clusters: Problem or document that each passage belongs to, [passages]. None stands for
                one passage each.

        Returns:
            `mean`, nats per scored token, and its `standard_error`; `agreement`, the share of
            tokens in percent, and its `agreement_standard_error`; `clusters` and `tokens`, their
            numbers.
        """
        mean, error = ratio(self.nats, self.tokens, clusters)
        share, share_error = ratio(100 * self.agreeing, self.tokens, clusters)
        count = len(self.tokens) if clusters is None else len(np.unique(np.asarray(clusters)))
        return {
            "mean": mean,
            "standard_error": error,
            "agreement": share,
            "agreement_standard_error": share_error,
            "clusters": count,
            "tokens": int(self.tokens.sum()),
        }


class Reference:
    """What full precision predicts for some passages; make it before the model is quantized.

    Args:
        loaded: Model in full precision. Its weights may change afterwards.
        passages: Passages to compare models on.
        batch_size: Number of passages per batch.
        file: File that keeps what the model predicts for other cells, once `keep` has written it.
            Its name has to identify the model and the passages.

    Raises:
        RunError: If the model's logits do not follow from its states and its output head.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        passages: Sequence[Passage],
        batch_size: int,
        file: Path | None = None,
    ) -> None:
        self.passages = list(passages)
        self.batch_size = batch_size
        self._saved = kept_states(loaded, file, lambda: self._states(loaded))
        self._require_head(loaded)

    def keep(self) -> None:
        """Writes the file, if there is to be one and it is not there."""
        self._saved.keep()

    def _states(self, loaded: LoadedModel) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for rows in likelihood.batches(self.passages, self.batch_size):
            states = likelihood.states_of(loaded, [self.passages[row] for row in rows])
            found |= {row: state.cpu().clone() for row, state in zip(rows, states, strict=True)}
        return [found[row] for row in range(len(self.passages))]

    @torch.inference_mode()
    def divergence(self, loaded: LoadedModel) -> Divergence:
        """Returns how far another state of the model is from this reference.

        Raises:
            RunError: If a divergence is not finite.
        """
        nats = np.zeros(len(self.passages))
        agreeing = np.zeros(len(self.passages), dtype=np.int64)
        for rows in likelihood.batches(self.passages, self.batch_size):
            logits = likelihood.logits_of(loaded, [self.passages[row] for row in rows])
            for row, others in zip(rows, logits, strict=True):
                own = self._saved.logits(row, others)
                nats[row] = float(kl(own, others).sum())
                agreeing[row] = int((own.argmax(1) == others.argmax(1)).sum())
                if not isfinite(nats[row]):
                    raise RunError(
                        f"model {loaded.name}: the logits for text {row} of those that it is "
                        "compared with full precision on are not finite; check its weights for "
                        "NaN or Inf and the scales of its quantized layers"
                    )
        tokens = np.array([passage.scored for passage in self.passages], dtype=np.int64)
        return Divergence(nats, agreeing, tokens)

    def _require_head(self, loaded: LoadedModel) -> None:
        """Refuses a model that changes its logits behind the output head, or is another one."""
        (expected,) = likelihood.logits_of(loaded, self.passages[:1])
        found = self._saved.logits(0, expected)
        near = 0.01 * float(expected.abs().max())
        if not torch.allclose(found, expected, rtol=0.0, atol=near):
            raise RunError(
                f"model {loaded.name}: its logits are not those of its output head, so its "
                "divergence from full precision cannot be measured. Give evaluation.kl_problems=0."
            )


def kl(reference: Tensor, other: Tensor) -> Tensor:
    """Returns KL(reference || other) per token in nats, [tokens].

    Args:
        reference, other: Logits [tokens, vocabulary].
    """
    p, q = log_softmax(reference).double(), log_softmax(other).double()
    return (p.exp() * (p - q)).sum(1)


def answer_passages(loaded: LoadedModel, problems: Sequence[Mapping[str, Any]]) -> list[Passage]:
    """Returns each problem's prompt followed by its expected answer, which is scored.

    Args:
        loaded: Model that the passages are for.
        problems: Problems in ScienceQA's schema, images decoded.

    Raises:
        UserError: If a passage does not fit the model's context.
    """
    return [
        likelihood.continuation(
            loaded,
            loaded.prompting.prompt(problem),
            loaded.prompting.target(problem),
            [] if problem["image"] is None else [problem["image"]],
            "a question with its expected answer",
            shorten=False,
        )
        for problem in problems
    ]

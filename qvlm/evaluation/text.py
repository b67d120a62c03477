"""How well a language model predicts plain text, alone and beside the model in full precision.

Every token of every document is scored once, given the tokens before it in its window. The windows
are lm-eval's (`get_rolling_token_windows`), so that the summed log-likelihoods are those of its
`loglikelihood_rolling`: the first window begins with the tokenizer's bos token, and windows do not
overlap. Three measures per token, in the order of what they need:

- the negative log-likelihood in nats, whose mean's exponential is the perplexity;
- KL(p || q) in nats, where p is the next-token distribution in full precision and q the model's;
- whether both find the same token most likely.

Tokens of one document depend on each other. Intervals therefore treat documents as clusters.

The output head is never quantized. So the reference keeps the last hidden states of the model in
full precision, a 50th of the size of its logits, and its head, from which logits follow.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.stats import t as student
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from qvlm.data.text import Document
from qvlm.errors import RunError
from qvlm.evaluation.evaluator import Evaluation
from qvlm.models.loaded import LoadedModel
from qvlm.records.files import write_file

CONFIDENCE = 0.95
# Number of positions whose logits are computed at a time, which bounds memory.
_POSITIONS = 256


@dataclass(frozen=True)
class Window:
    """A stretch of a document that is read at once.

    Attributes:
        document: Name of the document.
        inputs: Token ids that the model reads, [tokens].
        targets: Token ids that it predicts, those after the last `len(targets)` inputs.
    """

    document: str
    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Reference:
    """What a model in full precision makes of windows.

    Attributes:
        hidden: Last hidden states at the positions of the targets, [targets, width] per window.
        head: Weight of the output head, [vocabulary, width].
    """

    hidden: list[Tensor]
    head: Tensor


def windows_of(loaded: LoadedModel, documents: Sequence[Document], length: int) -> list[Window]:
    """Cuts documents into windows, each document beginning with the bos token.

    Args:
        loaded: Model with its tokenizer.
        documents: Documents, of which each token becomes the target of one window.
        length: Largest number of tokens that a window reads.
    """
    found = []
    for document in documents:
        ids = loaded.tokenizer(document.text, add_special_tokens=False)["input_ids"]
        rolling = get_rolling_token_windows(ids, loaded.tokenizer.bos_token_id, length, 1)
        for context, continuation in map(make_disjoint_window, rolling):
            read = torch.tensor([*context, *continuation][:-1])
            found.append(Window(document.name, read, torch.tensor(continuation)))
    return found


@torch.inference_mode()
def refer(loaded: LoadedModel, windows: Sequence[Window], file: Path | None = None) -> Reference:
    """Runs a model in full precision, or reads what it gave before.

    Args:
        loaded: Model in full precision.
        windows: Windows to score.
        file: File that keeps the reference for other cells. Its name has to identify the model and
            the windows.
    """
    if file is not None and file.is_file():
        return _read(file)
    hidden = [states.clone() for states in _hidden(loaded, windows, "full precision")]
    reference = Reference(hidden, loaded.model.lm_head.weight.detach().clone())
    if file is not None:
        tensors = {"head": reference.head.cpu()}
        tensors |= {f"hidden.{number}": states.cpu() for number, states in enumerate(hidden)}
        write_file(file, lambda path: save_file(tensors, path))
    return reference


def read_reference(file: Path) -> Reference | None:
    """Reads a reference that another cell left, or returns None if there is none."""
    return _read(file) if file.is_file() else None


@torch.inference_mode()
def evaluate_text(
    loaded: LoadedModel,
    windows: Sequence[Window],
    reference: Reference | None = None,
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
    all_states: Iterable[Tensor] = _hidden(loaded, windows, loaded.name)
    if is_reference and reference is not None:
        all_states = (states.to(loaded.model.lm_head.weight) for states in reference.hidden)
        distance_to = None
    else:
        distance_to = reference
    for number, (window, states) in enumerate(zip(windows, all_states, strict=True)):
        sums = rows.setdefault(window.document, {"document": window.document, "tokens": 0})
        sums["tokens"] += len(window.targets)
        for start in range(0, len(window.targets), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            targets = window.targets[part].to(states.device)
            logits = loaded.model.lm_head(states[part])
            q = logits.float().log_softmax(-1)
            found = {"nll": -q.gather(1, targets[:, None]).double().sum()}
            if distance_to is not None:
                wanted = distance_to.hidden[number][part].to(states)
                logits = functional.linear(wanted, distance_to.head.to(states))
                p = logits.float().log_softmax(-1)
                found["agreement"] = (p.argmax(-1) == q.argmax(-1)).double().sum()
                found["kl"] = (p.exp() * (p - q)).sum(-1).double().clamp_min(0).sum()
            for name, value in found.items():
                if not bool(value.isfinite()):
                    raise RunError(
                        f"model {loaded.name}: the logits for document {window.document} are not "
                        "finite; check its weights and the scales of its quantized layers"
                    )
                sums[name] = sums.get(name, 0.0) + float(value)
    table = pd.DataFrame(rows.values())
    observed = [observe(loaded.model)] if observe else []
    return Evaluation({"text": summarize(table)}, table, 0, [len(windows)], observed)


def summarize(documents: pd.DataFrame) -> dict[str, Any]:
    """Computes the measures of `evaluate_text` with their intervals.

    Args:
        documents: One row per document with its sums.

    Returns:
        `tokens`, `documents`, and for each measure a mapping with the keys `value`, `low` and
        `high`: `perplexity`; `kl` in nats per token; `agreement` in percent. Low and high end a
        95 % interval and are None with a single document. A measure without sums is None.
    """
    log_perplexity = _ratio(documents, "nll")
    assert log_perplexity is not None
    agreement = _ratio(documents, "agreement")
    return {
        "tokens": int(documents["tokens"].sum()),
        "documents": len(documents),
        "perplexity": {k: None if v is None else exp(v) for k, v in log_perplexity.items()},
        "kl": _ratio(documents, "kl"),
        "agreement": agreement
        and {k: None if v is None else 100 * v for k, v in agreement.items()},
    }


def _ratio(documents: pd.DataFrame, name: str) -> dict[str, float | None] | None:
    """The mean of a measure per token, with the interval of a ratio of sums over clusters.

    The standard error is that of the linearized ratio (Cochran, Sampling Techniques, section 6.4),
    and the interval takes Student's t with one degree of freedom less than there are documents.
    """
    if name not in documents:
        return None
    sums, tokens = documents[name].to_numpy(float), documents["tokens"].to_numpy(float)
    mean, count = sums.sum() / tokens.sum(), len(documents)
    if count < 2:
        return {"value": mean, "low": None, "high": None}
    residuals = sums - mean * tokens
    error = (count / (count - 1) * (residuals**2).sum()) ** 0.5 / tokens.sum()
    reach = float(student.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return {"value": mean, "low": mean - reach, "high": mean + reach}


def _hidden(loaded: LoadedModel, windows: Sequence[Window], label: str) -> Iterator[Tensor]:
    """The last hidden states at the positions of each window's targets, [targets, width]."""
    for window in tqdm(windows, desc=f"{label}: windows", unit="w", leave=False, disable=None):
        ids = window.inputs[None].to(loaded.model.device)
        mask = torch.ones_like(ids)
        output = loaded.model.model(input_ids=ids, attention_mask=mask, use_cache=False)
        yield output.last_hidden_state[0, -len(window.targets) :]


def _read(file: Path) -> Reference:
    with safe_open(file, framework="pt") as opened:
        count = len(opened.keys()) - 1
        hidden = [opened.get_tensor(f"hidden.{number}") for number in range(count)]
        return Reference(hidden, opened.get_tensor("head"))

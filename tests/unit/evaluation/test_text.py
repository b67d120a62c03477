"""Scores of plain text beside written-out references, and the coverage of their intervals."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from qvlm.data.prompts import Prompting
from qvlm.data.text import Document
from qvlm.errors import RunError
from qvlm.evaluation.text import evaluate_text, refer, windows_of
from qvlm.evaluation.text_metrics import summarize
from qvlm.models.loaded import LoadedModel
from tests.helpers.language_models import tiny_language_model, tiny_tokenizer

DOCUMENTS = [
    Document("a", "one two three four five six seven eight nine ten"),
    Document("b", "ten . nine . eight . two"),
]


def loaded(seed: int = 0) -> LoadedModel:
    """A tiny LLaMA with its tokenizer."""
    prompting = Prompting("CQM-A", "smollm2")
    return LoadedModel(tiny_language_model(seed), tiny_tokenizer(), None, prompting, "tiny")


def log_probabilities(model: LoadedModel, text: str) -> tuple[torch.Tensor, list[int]]:
    """Next-token log-probabilities [tokens, vocabulary] of a text after bos, and its tokens."""
    ids = model.tokenizer(text)["input_ids"]
    inputs = torch.tensor([[model.tokenizer.bos_token_id, *ids]])
    with torch.no_grad():
        return model.model(inputs).logits[0, :-1].double().log_softmax(-1), ids


def test_every_measure_equals_its_definition() -> None:
    exact, other = loaded(0), loaded(1)
    windows = windows_of(exact, DOCUMENTS, 64)
    rows = evaluate_text(other, windows, refer(exact, windows)).predictions.set_index("document")
    for document in DOCUMENTS:
        p, ids = log_probabilities(exact, document.text)
        q, _ = log_probabilities(other, document.text)
        row = rows.loc[document.name]
        assert row["tokens"] == len(ids)
        assert row["nll"] == pytest.approx(-float(q[range(len(ids)), ids].sum()), rel=1e-5)
        assert row["kl"] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)
        assert row["agreement"] == int((p.argmax(-1) == q.argmax(-1)).sum())


def test_windows_score_every_token_once_as_lm_eval_does() -> None:
    model = loaded()
    windows = windows_of(model, DOCUMENTS, 4)
    assert max(len(window.passage.ids) - 1 for window in windows) == 4
    ids = model.tokenizer(DOCUMENTS[0].text)["input_ids"]
    own = [window for window in windows if window.document == "a"]
    assert torch.cat([window.targets for window in own]).tolist() == ids
    expected = 0.0
    for start in range(0, len(ids), 4):  # each window begins with the token before it
        before = model.tokenizer.bos_token_id if start == 0 else ids[start - 1]
        read = [before, *ids[start : start + 4]]
        if len(read) < 5 and start:  # the last window is filled up from the left
            read = ids[-5:]
        with torch.no_grad():
            scores = model.model(torch.tensor([read[:-1]])).logits[0].double().log_softmax(-1)
        count = min(4, len(ids) - start)
        expected -= sum(
            float(scores[at, read[at + 1]]) for at in range(len(read) - 1 - count, len(read) - 1)
        )
    rows = evaluate_text(model, windows).predictions.set_index("document")
    assert rows.loc["a", "nll"] == pytest.approx(expected, rel=1e-5)


def test_full_precision_is_read_from_its_reference(tmp_path: Path) -> None:
    model = loaded()
    windows = windows_of(model, DOCUMENTS, 64)
    file = tmp_path / "reference.safetensors"
    reference = refer(model, windows, file)
    reference.keep()
    again = refer(loaded(1), windows, file)  # read, not computed by this other model
    assert all(map(torch.equal, reference.states, again.states))
    assert torch.equal(reference.head, again.head)
    whole = evaluate_text(model, windows).metrics["text"]
    read = evaluate_text(model, windows, again, is_reference=True).metrics["text"]
    assert read["perplexity"]["value"] == pytest.approx(whole["perplexity"]["value"], rel=1e-6)
    assert read["kl"] is None
    same = evaluate_text(model, windows, again).metrics["text"]
    assert same["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert same["agreement"]["value"] == 100


def test_a_broken_model_is_an_error() -> None:
    model = loaded()
    model.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(RunError, match="document a are not finite"):
        evaluate_text(model, windows_of(model, DOCUMENTS, 64))


def test_intervals_cover_where_tokens_of_a_document_go_together() -> None:
    random, covered, trials = np.random.default_rng(0), 0, 800
    for _ in range(trials):
        tokens = random.integers(500, 1500, 24)
        level = random.normal(1.0, 0.3, 24)  # what all tokens of a document share
        sums = tokens * level + random.normal(0, 1, 24) * np.sqrt(tokens)
        kl = summarize(pd.DataFrame({"tokens": tokens, "nll": sums, "kl": sums}))["kl"]
        covered += kl["low"] <= 1.0 <= kl["high"]
    assert 0.92 <= covered / trials <= 0.97

"""The divergence from full precision against NumPy, and its standard error against simulation."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from qvlm.errors import RunError
from qvlm.evaluation import likelihood
from qvlm.evaluation.divergence import Divergence, Reference, answer_passages, kl
from qvlm.evaluation.evaluator import Evaluation
from qvlm.evaluation.metrics import ratio
from qvlm.models import LoadedModel
from tests.helpers.problems import make_model, make_problems

PROBLEMS = make_problems(11, seed=4)


def perturb(loaded: LoadedModel, amount: float) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=generator)


def target_logits(loaded: LoadedModel, problem: dict[str, Any]) -> np.ndarray:
    """The logits before each token of the expected answer, of a problem by itself."""
    prompt, whole = (loaded.encode([problem], with_target=t) for t in (False, True))
    first = prompt["input_ids"].shape[1]
    with torch.no_grad():
        logits = loaded.model(**whole).logits[0]
    return logits[first - 1 : -1].double().numpy()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_divergence_of_each_answer_equals_its_definition(batch_size: int) -> None:
    loaded = make_model()
    reference = Reference(loaded, answer_passages(loaded, PROBLEMS), batch_size)
    before = [target_logits(loaded, problem) for problem in PROBLEMS]
    perturb(loaded, 0.05)  # the output head too: the reference keeps its own
    after = [target_logits(loaded, problem) for problem in PROBLEMS]
    found = reference.divergence(loaded)
    for row, (own, other) in enumerate(zip(before, after, strict=True)):
        p, q = log_softmax(own), log_softmax(other)
        assert found.nats[row] == pytest.approx(float((np.exp(p) * (p - q)).sum()), rel=1e-3)
        assert found.agreeing[row] == int((own.argmax(1) == other.argmax(1)).sum())
        assert found.tokens[row] == len(own)
    assert 0 < found.agreeing.sum() < found.tokens.sum()
    summary = found.summary()
    assert summary["mean"] == pytest.approx(found.nats.sum() / found.tokens.sum())
    assert summary["tokens"] == found.tokens.sum()


def test_an_unchanged_model_does_not_diverge() -> None:
    loaded = make_model()
    found = Reference(loaded, answer_passages(loaded, PROBLEMS), 4).divergence(loaded)
    assert np.abs(found.nats).max() < 1e-9
    assert (found.agreeing == found.tokens).all()


def test_another_cell_reads_what_the_first_one_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, file = make_model(), tmp_path / "references" / "toy.safetensors"
    loaded.model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, len(loaded.tokenizer)))
    passages = answer_passages(loaded, PROBLEMS)
    first = Reference(loaded, passages, 4, file)
    assert not file.exists()
    first.keep()
    monkeypatch.setattr(likelihood, "states_of", None)
    second = Reference(loaded, passages, 4, file)
    perturb(loaded, 0.05)
    found, again = first.divergence(loaded), second.divergence(loaded)
    assert found.nats.tolist() == again.nats.tolist() and found.nats.min() > 0


def test_what_another_model_kept_is_refused(tmp_path: Path) -> None:
    loaded, file = make_model(), tmp_path / "toy.safetensors"
    Reference(loaded, answer_passages(loaded, PROBLEMS), 4, file).keep()
    perturb(loaded, 0.5)
    with pytest.raises(RunError, match="not those of its output head"):
        Reference(loaded, answer_passages(loaded, PROBLEMS), 4, file)


def test_a_model_that_changes_its_logits_behind_the_head_is_refused() -> None:
    loaded = make_model()

    def cap(module: Any, args: Any, output: Any) -> Any:
        output.logits = torch.tanh(output.logits)
        return output

    loaded.model.register_forward_hook(cap)
    with pytest.raises(RunError, match=r"not those of its output head.*kl_problems=0"):
        Reference(loaded, answer_passages(loaded, PROBLEMS), 4)


def test_a_broken_model_is_an_error() -> None:
    loaded = make_model()
    reference = Reference(loaded, answer_passages(loaded, PROBLEMS[:2]), 4)
    with torch.no_grad():
        loaded.model.lm_head.weight[3] = float("nan")
    with pytest.raises(RunError, match="model toy: the logits for text"):
        reference.divergence(loaded)


def test_kl_is_not_symmetric_and_never_negative() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(50, 9, generator=generator).double() for _ in range(2))
    assert (kl(a, b) > 0).all()
    assert not torch.allclose(kl(a, b), kl(b, a))
    assert torch.allclose(kl(a, a + 3.0), torch.zeros(50, dtype=torch.float64), atol=1e-9)


def test_the_standard_error_of_a_ratio_is_the_spread_of_the_estimate() -> None:
    """Problems differ in length and in difficulty, and long ones are harder."""
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(2000):
        sizes = rng.integers(3, 30, 150)
        values = sizes * rng.gamma(2.0, 0.01 * sizes**0.5)
        mean, error = ratio(values, sizes)
        means.append(mean)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.05)


def test_passages_of_one_document_count_as_one_cluster() -> None:
    nats, tokens = np.array([1.0, 2.0, 6.0, 1.0]), np.array([2, 2, 4, 2])
    found = Divergence(nats, tokens // 2, tokens).summary(["a", "a", "b", "b"])
    assert (found["mean"], found["standard_error"]) == ratio([3.0, 7.0], [4, 6])
    assert found["clusters"] == 2
    assert ratio([3.0], [4])[1] == float("inf")


def test_an_evaluation_keeps_the_divergence_of_the_questions_it_was_measured_on() -> None:
    predictions = pd.DataFrame({"question_id": ["a", "b", "c"]})
    divergence = Divergence(np.array([0.5, 0.25]), np.array([1, 2]), np.array([2, 2]))
    found = Evaluation({"classes": {}}, predictions).with_divergence(divergence)
    assert found.metrics["kl"] == divergence.summary()
    assert found.predictions["kl"].tolist()[:2] == [0.5, 0.25]
    assert found.predictions["answer_tokens"].tolist()[:2] == [2, 2]
    assert found.predictions.loc[2, ["kl", "answer_tokens"]].isna().all()
    assert "kl" not in predictions

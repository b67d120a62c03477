"""The script that tunes a language model into a LLaVA: masks, resumption, checkpoint."""

from pathlib import Path

import pytest
import torch

from experiments import train_smollm2_llava as training
from qvlm.data.miniature import generate
from qvlm.models import LoadedModel, load_model
from tests.helpers.language_models import save_language_model

RECIPE = training.Recipe(steps=4, batch_size=2, warmup=1)


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny LLaMA that has room for a prompt."""
    folder = tmp_path_factory.mktemp("language") / "llama"
    return save_language_model(folder, vocab_size=20, max_position_embeddings=2048)


PROBLEMS = generate("train", 6, seed=0)


def test_the_loss_is_that_of_the_answer(language: Path) -> None:
    loaded = training.build(language)
    batch = training.batch_of(loaded, PROBLEMS[:2])
    for row, problem in enumerate(PROBLEMS[:2]):
        target = loaded.tokenizer(loaded.prompting.target(problem))["input_ids"]
        kept = batch["labels"][row] != training.IGNORED
        assert batch["labels"][row][kept].tolist() == target
        assert int(kept.sum()) == len(target)


def test_a_killed_run_ends_where_another_does(language: Path, tmp_path: Path) -> None:
    def run(out: Path, *stops: int | None) -> LoadedModel:
        for until in stops:
            loaded = training.build(language)
            training.train(loaded, PROBLEMS, RECIPE, out, save_every=1, until=until)
        return loaded

    whole, resumed = run(tmp_path / "whole", None), run(tmp_path / "resumed", 2, None)
    for (name, one), other in zip(
        training.trained(whole.model).items(),
        training.trained(resumed.model).values(),
        strict=True,
    ):
        assert torch.equal(one, other), name
    start = training.build(language)
    assert any(
        not torch.equal(one, other)
        for one, other in zip(
            training.trained(whole.model).values(),
            training.trained(start.model).values(),
            strict=True,
        )
    )


def test_the_merged_checkpoint_answers_as_the_trained_model(language: Path, tmp_path: Path) -> None:
    loaded = training.build(language)
    training.train(loaded, PROBLEMS, RECIPE, tmp_path)
    batch = loaded.encode(PROBLEMS[:2], with_target=True)
    with torch.no_grad():
        expected = loaded.model.eval()(**batch).logits
    assert training.save(loaded, tmp_path) > 0
    merged = load_model(tmp_path / "model", "merged", training.PROMPTING)
    with torch.no_grad():
        found = merged.model(**batch).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert not list((tmp_path / "model").glob("*.py"))

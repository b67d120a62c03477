"""The script that tunes a language model into a LLaVA: masks, resumption, checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

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
            training.train(loaded, RECIPE, out, save_every=1, until=until)
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


def test_every_batch_depends_on_the_seed_and_its_step(language: Path) -> None:
    batches = training.Batches(training.build(language), RECIPE)
    other = training.Batches(training.build(language), replace(RECIPE, seed=1))
    assert torch.equal(batches[1]["input_ids"], batches[1]["input_ids"])
    drawn = [batches[0], batches[1], other[1]]
    assert len({str(batch["input_ids"].tolist()) for batch in drawn}) == 3


def test_the_merged_checkpoint_answers_as_the_trained_model(language: Path, tmp_path: Path) -> None:
    loaded = training.build(language)
    training.train(loaded, RECIPE, tmp_path)
    batch = loaded.encode(PROBLEMS[:2], with_target=True)
    training.load_adapter(loaded.model, tmp_path / training.ADAPTER)  # as it is in half precision
    with torch.no_grad():
        expected = loaded.model.eval()(**batch).logits
    training.assemble(tmp_path / training.ADAPTER, language, tmp_path / "model")
    merged = load_model(tmp_path / "model", "merged", training.PROMPTING)
    assert not merged.begins_with_bos
    with torch.no_grad():
        found = merged.model(**batch).logits
    assert torch.allclose(found, expected, atol=1e-4)
    start = training.build(language).model.eval()
    with torch.no_grad():
        assert not torch.allclose(start(**batch).logits, expected, atol=1e-4)
    assert not list((tmp_path / "model").glob("*.py"))


def test_an_adapter_of_another_model_is_refused(language: Path, tmp_path: Path) -> None:
    model = training.build(language).model
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other names"):
        training.load_adapter(model, tmp_path / "other.safetensors")


def test_the_shipped_adapter_has_the_size_of_its_recipe() -> None:
    folder = training.__file__.removesuffix("train_smollm2_llava.py") + "smollm2_llava"
    kept = load_file(Path(folder) / training.ADAPTER)
    about = yaml.safe_load((Path(folder) / "training.yaml").read_text())
    linears = {name.rpartition(".")[0] for name in kept if name.endswith(".a")}
    assert len(linears) == 7 * 30
    assert all(kept[f"{name}.a"].shape[0] == training.RANK for name in linears)
    assert about["recipe"]["steps"] > 0 and about["validation"]["right"] > 0

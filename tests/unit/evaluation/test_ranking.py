"""Choices ranked by likelihood, for a LLaVA and for a language model alone, beside a loop."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qvlm.cell.identity import Cell
from qvlm.cell.pipeline import run_cell
from qvlm.data.prompts import LETTERS, Prompting
from qvlm.errors import UserError
from qvlm.evaluation.evaluator import evaluate
from qvlm.evaluation.metrics import CLASSES
from qvlm.models import LoadedModel
from qvlm.records.record import Record
from qvlm.tables.selection import of_whole_method
from tests.helpers.configs import load
from tests.helpers.language_models import tiny_language_model, tiny_tokenizer
from tests.helpers.problems import make_dataset, make_model, make_problems

pytestmark = pytest.mark.slow


def likeliest(loaded: LoadedModel, problem: dict[str, Any]) -> int:
    """The choice whose answer has the largest log-probability, each in a pass of its own."""
    found = []
    for answer in loaded.prompting.answers(problem):
        prompt = loaded.prompting.prompt(problem)
        images = [] if problem["image"] is None else [problem["image"]]
        whole = loaded.encode_prompts([prompt + answer], [images])
        before = loaded.encode_prompts([prompt.rstrip()], [images])["input_ids"].shape[1]
        with torch.no_grad():
            logits = loaded.model(**whole).logits[0, :-1].double().log_softmax(-1)
        ids = whole["input_ids"][0, 1:]
        found.append(float(logits[range(len(ids)), ids][before - 1 :].sum()))
    return max(range(len(found)), key=found.__getitem__)


def spread(loaded: LoadedModel) -> LoadedModel:
    """Gives every word a probability of its own."""
    with torch.no_grad():
        weight = loaded.model.lm_head.weight
        generator = torch.Generator().manual_seed(5)
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return loaded


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_likeliest_answer_is_taken(batch_size: int) -> None:
    loaded, problems = spread(make_model()), make_problems(12, seed=4)
    dataset = make_dataset(problems)
    evaluation = evaluate(loaded, dataset, batch_size, 4, scoring="rank", observe=lambda _: "seen")
    found = evaluation.predictions
    assert found["prediction"].tolist() == [likeliest(loaded, problem) for problem in problems]
    assert found["text"].tolist() == [LETTERS[choice] for choice in found["prediction"]]
    assert found["prediction"].nunique() > 1  # the comparison says something
    right = [p["answer"] == choice for p, choice in zip(problems, found["prediction"], strict=True)]
    assert found["correct"].tolist() == right
    assert evaluation.metrics["classes"]["Avg"]["unparsable"] == 0
    assert (evaluation.metrics["cut"], evaluation.observed) == (0, ["seen"])


def test_answers_are_written_as_the_model_writes_them() -> None:
    problem = {"choices": ["x", "y"]}
    assert Prompting("QCM-LEA", "vicuna_v1").answers(problem) == [
        " The answer is A.",
        " The answer is B.",
    ]
    assert Prompting("CQM-A", "smollm2").answers(problem) == ["A", "B"]
    for form in ("QCM-LEA", "QCM-LEPA", "CQM-A"):
        prompting = Prompting(form)
        assert [prompting.parse(text, 2) for text in prompting.answers(problem)] == [0, 1]


def test_another_scoring_is_refused() -> None:
    with pytest.raises(UserError, match="evaluation.scoring=guess is not a known value"):
        load("evaluation.scoring=guess")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems in ScienceQA's schema as parquet, and a language model without a tower."""
    folder = tmp_path_factory.mktemp("language")
    (folder / "data").mkdir()
    for split, count in (("train", 30), ("test", 40)):
        rows = make_dataset(make_problems(count, seed=count), split)
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([*LETTERS])
    size = len(tokenizer)
    model = tiny_language_model(vocab_size=size, max_position_embeddings=512)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def test_a_language_model_ranks_the_questions_without_a_picture(
    folder: Path, tmp_path: Path
) -> None:
    options = ["model=smollm2", "model.name=llama", f"model.path={folder}/model", "data=folder"]
    options += [f"data.source={folder}/data", f"results_dir={tmp_path}", "tracking=off"]
    options += ["calibration.images=none", "calibration.samples=4", "evaluation.scoring=rank"]
    cells = {
        bits: load(*options, "method=rtn", f"bits={bits}", "device=cpu") for bits in ("fp", "w3a3")
    }
    full, quantized = (Record.load(run_cell(Cell.of(config))) for config in cells.values())
    blind = [problem for problem in make_problems(40, seed=40) if problem["image"] is None]
    assert len(full.predictions) == len(blind)
    assert full.predictions["answer"].tolist() == [problem["answer"] for problem in blind]
    assert set(full.metrics["classes"]) == set(CLASSES)
    assert full.metrics["classes"]["IMG"]["n"] == 0
    assert full.metrics["classes"]["NAT"]["n"] > 0
    assert quantized.layers
    assert quantized.run["exceeding"] == []
    assert quantized.metrics["kl"]["mean"] > 0
    assert full.run["influences"]["evaluation"]["scoring"] == "rank"
    assert not of_whole_method(full)  # pages of generated answers leave it out
    generated = load(*options[:-1], "bits=fp", "device=cpu")
    assert "scoring" not in Cell.of(generated).influences["evaluation"]

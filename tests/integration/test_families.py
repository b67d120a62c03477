"""`model=hf` on the command line's line and in the API, on a local data set."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedModel

import qvlm
from qvlm.data.prompts import pictures_of
from qvlm.errors import UserError
from qvlm.evaluation import likelihood
from qvlm.evaluation.evaluator import evaluate
from qvlm.records.record import Record
from tests.helpers.cells import run
from tests.helpers.configs import load
from tests.helpers.families import Folders, load_tiny, picture, problems, write_family
from tests.helpers.problems import FEATURES, make_dataset


@torch.no_grad()
def teach(model: PreTrainedModel, folder: Path) -> None:
    """Makes a model with a head of its own answer "A" to the problems, and saves it."""
    loaded = load_tiny(folder)
    batch: dict[str, Any] = loaded.encode(problems())
    states = loaded.model.base_model(**batch, use_cache=False).last_hidden_state[:, -1]
    wanted = torch.full((len(states), 1), 50.0)
    weight: Any = model.get_output_embeddings().weight
    weight[loaded.tokenizer.convert_tokens_to_ids("A")] = torch.linalg.pinv(states) @ wanted[:, 0]
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options that name a tiny Qwen2.5-VL and a data set."""
    folder = tmp_path_factory.mktemp("families")
    teach(write_family(folder / "model", "qwen2_5_vl"), folder / "model")
    named = {"grade": "grade1", "subject": "natural science", "skill": "first"}
    rows = [{**dict.fromkeys(FEATURES, ""), **problem, **named} for problem in problems()]
    for split in ("train", "test"):
        table = datasets.Dataset.from_list(rows, features=FEATURES)
        table.to_parquet(folder / "data" / f"{split}.parquet")
    return [
        *(f"model.path={folder / 'model'}", "data=folder", f"data.source={folder / 'data'}"),
        *("calibration.samples=3", "evaluation.max_new_tokens=1", "device=cpu"),
    ]


def test_a_cell_of_a_family_is_recorded_with_its_bits_proven(
    options: list[str], tmp_path: Path
) -> None:
    places = [f"results_dir={tmp_path / 'results'}", f"save_packed={tmp_path / 'packed'}"]
    cell = load("model=hf", "method=rtn", "bits=w8a8", "tracking=off", *options, *places)
    record = Record.load(run(cell))
    assert list(record.predictions["text"]) == ["A"] * len(problems())
    assert record.run["exceeding"] == [] and len(record.layers) == len(
        json.loads((tmp_path / "packed" / "qvlm.json").read_text())["expected"]
    )
    assert record.metrics["kl"]["mean"] < 0.5


def test_the_api_loads_asks_quantizes_proves_and_saves(options: list[str], tmp_path: Path) -> None:
    model = qvlm.load("hf", *options)
    shapes = picture(28, 28), picture(56, 28)
    assert isinstance(model.ask("Which?", ["this", "that"], list(shapes)), str)
    qvlm.quantize(model, "roco", "w4a4")
    assert qvlm.prove(model).holds
    qvlm.save(model, tmp_path / "packed")
    again = qvlm.load(tmp_path / "packed", "device=cpu", "evaluation.max_new_tokens=1")
    assert again.method == "RoCo" and qvlm.prove(again).holds
    assert again.ask("Which?", ["this", "that"]) == model.ask("Which?", ["this", "that"])


def test_answers_are_ranked_with_pictures(options: list[str], folder_of: Folders) -> None:
    """Pictures of a data set are still encoded when the processor counts their tokens."""
    model = qvlm.load("hf", *options, "evaluation.scoring=rank")
    assert list(qvlm.evaluate(model).predictions["text"]) == ["A"] * len(problems())
    loaded = load_tiny(folder_of("qwen2_vl"))
    rows = [{**dict.fromkeys(FEATURES, ""), **problem} for problem in problems()]
    found = evaluate(loaded, make_dataset(rows), 3, 1, scoring="rank", progress=False)
    expected = []
    for problem in problems():
        prompt, pictures = loaded.prompting.prompt(problem), pictures_of(problem["image"])
        scores = [
            likelihood.score(loaded, [likelihood.continuation(loaded, prompt, answer, pictures)])[
                0
            ].log_probability
            for answer in loaded.prompting.answers(problem)
        ]
        expected.append(scores.index(max(scores)))
    assert found.predictions["prediction"].tolist() == expected


def test_what_is_missing_or_not_possible_is_one_sentence(options: list[str]) -> None:
    with pytest.raises(UserError, match="model.path is not given"):
        qvlm.load("hf")
    with pytest.raises(UserError, match="model.dtype=float64 is not possible with Qwen2.5-VL"):
        qvlm.load("hf", *options, "model.dtype=float64")
    with pytest.raises(UserError, match=r"the question has \d+ tokens and does not fit"):
        qvlm.load("hf", *options).ask("why " * 1000, ["this", "that"])

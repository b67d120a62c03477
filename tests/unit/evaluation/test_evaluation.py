"""Evaluation through lm-eval, on a tiny random LLaVA whose answers are letters."""

import io
import json
import logging
import random
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from qvlm.data.prompts import OFFICIAL_LETTERS as LETTERS
from qvlm.data.prompts import guess
from qvlm.errors import RunError, UserError
from qvlm.evaluation.adapter import InMemoryModel
from qvlm.evaluation.evaluator import evaluate
from qvlm.models import LoadedModel
from tests.helpers.problems import make_dataset, make_model, make_problems

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return make_model()


@pytest.fixture(scope="module")
def problems() -> list[dict[str, Any]]:
    return make_problems(66)


@pytest.fixture(scope="module")
def dataset(problems: list[dict[str, Any]]) -> datasets.Dataset:
    return make_dataset(problems)


def run(loaded: LoadedModel, dataset: datasets.Dataset, **options: Any) -> pd.DataFrame:
    settings = {"batch_size": 16, "max_new_tokens": 4, **options}
    return evaluate(loaded, dataset, **settings).predictions


@pytest.fixture(scope="module")
def predictions(loaded: LoadedModel, dataset: datasets.Dataset) -> pd.DataFrame:
    return run(loaded, dataset)


def answer_alone(loaded: LoadedModel, problem: dict[str, Any], tokens: int) -> str:
    """Greedy decoding of one problem without lm-eval, `generate`, cache or padding."""
    batch = loaded.encode([problem])
    ids, prompt = batch.pop("input_ids"), batch.pop("attention_mask").shape[1]
    with torch.no_grad():
        for _ in range(tokens):
            logits = loaded.model(input_ids=ids, **batch).logits[0, -1]
            ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
            if ids[0, -1] == loaded.tokenizer.eos_token_id:
                break
    return loaded.decode(ids[:, prompt:])[0]


def test_answers_are_those_of_each_problem_alone(
    loaded: LoadedModel, problems: list[dict[str, Any]], predictions: pd.DataFrame
) -> None:
    assert predictions["text"].tolist() == [answer_alone(loaded, p, 4) for p in problems]
    assert predictions["text"].nunique() > 10  # the comparison says something
    assert 0 < predictions["prediction"].isna().sum() < len(predictions)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_changes_nothing(
    loaded: LoadedModel, dataset: datasets.Dataset, predictions: pd.DataFrame, batch_size: int
) -> None:
    pd.testing.assert_frame_equal(run(loaded, dataset, batch_size=batch_size), predictions)


def test_predictions_describe_the_dataset_in_its_order(
    problems: list[dict[str, Any]], predictions: pd.DataFrame
) -> None:
    expected = pd.DataFrame(
        {
            "question_id": [f"test-{i}" for i in range(len(problems))],
            "official_id": None,
            "subject": [p["subject"] for p in problems],
            "grade": [p["grade"] for p in problems],
            "skill": [p["skill"] for p in problems],
            "has_image": [p["image"] is not None for p in problems],
            "has_text": [p["hint"] != "" for p in problems],
            "n_choices": [len(p["choices"]) for p in problems],
            "answer": [p["answer"] for p in problems],
        }
    )
    pd.testing.assert_frame_equal(predictions[expected.columns.tolist()], expected)
    assert predictions.columns.tolist() == [
        *expected.columns,
        *("prediction", "correct", "text", "cut"),
    ]
    for row in predictions.itertuples():
        named = LETTERS.find(row.text) if len(row.text) == 1 else -1
        parsable = 0 <= named < row.n_choices
        assert (row.prediction == named) if parsable else pd.isna(row.prediction)
        assert row.correct == (parsable and named == row.answer)


def test_metrics_are_those_of_the_predictions(
    loaded: LoadedModel, dataset: datasets.Dataset, predictions: pd.DataFrame
) -> None:
    metrics = evaluate(loaded, dataset, batch_size=16, max_new_tokens=4).metrics
    average = metrics["classes"]["Avg"]
    assert metrics["unparsable_rule"] == "wrong"
    assert average["n"] == len(predictions)
    assert average["accuracy"] == pytest.approx(100 * predictions["correct"].mean())
    assert average["unparsable"] == pytest.approx(100 * predictions["prediction"].isna().mean())


def test_a_split_without_a_name_is_numbered(
    loaded: LoadedModel, problems: list[dict[str, Any]]
) -> None:
    unnamed = make_dataset(problems[:20], split=None)
    assert run(loaded, unnamed)["question_id"].tolist() == [str(i) for i in range(20)]


def test_ids_of_the_authors_are_kept(
    loaded: LoadedModel, dataset: datasets.Dataset, tmp_path: Path
) -> None:
    ids = [str(7 * index) for index in range(len(dataset))]
    predictions = run(loaded, dataset.add_column("official_id", ids))
    predictions.to_parquet(tmp_path / "predictions.parquet")
    assert list(pd.read_parquet(tmp_path / "predictions.parquet")["official_id"]) == ids


def test_predictions_survive_parquet(predictions: pd.DataFrame, tmp_path: Path) -> None:
    predictions.to_parquet(tmp_path / "predictions.parquet")
    again = pd.read_parquet(tmp_path / "predictions.parquet")
    pd.testing.assert_frame_equal(again, predictions)


def test_images_reach_the_model_decoded_once_and_only_where_there_are_any(
    loaded: LoadedModel,
    problems: list[dict[str, Any]],
    dataset: datasets.Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, list[Image.Image]]] = []
    pixels: list[bool] = []
    opened = 0
    token_ids, collate, open_image = loaded.token_ids, loaded.collate, Image.open

    def spy_texts(prompts: list[str], images: list[list[Image.Image]]) -> list[list[int]]:
        seen.extend(zip(prompts, images, strict=True))
        return token_ids(prompts, images)

    def spy_pixels(
        rows: list[list[int]], images: list[list[Image.Image]]
    ) -> dict[str, torch.Tensor]:
        batch = collate(rows, images)
        pixels.append("pixel_values" in batch)
        return batch

    def count(*args: Any, **kwargs: Any) -> Image.Image:
        nonlocal opened
        opened += 1
        return open_image(*args, **kwargs)

    monkeypatch.setattr(loaded, "token_ids", spy_texts)
    monkeypatch.setattr(loaded, "collate", spy_pixels)
    monkeypatch.setattr(Image, "open", count)
    run(loaded, dataset, batch_size=8)

    def key(prompt: str, images: list[Image.Image]) -> tuple[str, list[bytes]]:
        return prompt, [image.convert("RGB").tobytes() for image in images]

    expected = [
        key(loaded.prompting.prompt(p), [p["image"]] if p["image"] else []) for p in problems
    ]
    assert sorted(key(*pair) for pair in seen) == sorted(expected)
    assert opened == sum(p["image"] is not None for p in problems)
    assert True in pixels
    assert False in pixels


def test_the_picture_matters(
    loaded: LoadedModel, problems: list[dict[str, Any]], predictions: pd.DataFrame
) -> None:
    black = [p | {"image": p["image"] and Image.new("RGB", p["image"].size)} for p in problems]
    changed = run(loaded, make_dataset(black))["text"] != predictions["text"]
    assert changed.any()
    assert predictions["has_image"][changed].all()


def test_generation_ends_with_the_last_row(
    problems: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    eos = model.tokenizer.eos_token_id
    with torch.no_grad():  # every logit is 0, except that the first token is never </s>
        model.model.lm_head.weight.zero_()
    calls: list[int] = []

    def forward_hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        first = not calls or kwargs["input_ids"].shape[1] > 1
        calls.append(1)
        output.logits[:, :, model.tokenizer.convert_tokens_to_ids("A")] = 1.0
        output.logits[:, :, eos] = 0.0 if first else 2.0
        return output

    model.model.register_forward_hook(forward_hook, with_kwargs=True)
    predictions = run(model, make_dataset(problems[:12]), batch_size=12, max_new_tokens=50)
    assert predictions["text"].tolist() == ["A"] * 12
    assert len(calls) == 2


def test_max_new_tokens_cuts_the_answer(loaded: LoadedModel, dataset: datasets.Dataset) -> None:
    lengths = run(loaded, dataset, max_new_tokens=2)["text"].str.split().str.len()
    assert lengths.max() == 2


def test_a_random_choice_replaces_only_unparsable_answers(
    loaded: LoadedModel, dataset: datasets.Dataset, predictions: pd.DataFrame
) -> None:
    lucky = run(loaded, dataset, unparsable="random", seed=3)
    same = ["question_id", "prediction", "text"]
    pd.testing.assert_frame_equal(lucky[same], predictions[same])
    parsed = predictions["prediction"].notna()
    assert (lucky["correct"] == predictions["correct"])[parsed].all()
    for row in lucky[~parsed].itertuples():
        choice = guess(row.question_id, row.n_choices, seed=3)
        assert row.correct == (choice == row.answer)
    assert lucky["correct"][~parsed].any()
    assert not predictions["correct"][~parsed].any()
    pd.testing.assert_frame_equal(run(loaded, dataset, unparsable="random", seed=3), lucky)


@pytest.mark.parametrize("n_choices", [2, 3, 5])
def test_guesses_are_uniform_and_depend_on_the_seed(n_choices: int) -> None:
    first = [guess(f"test-{i}", n_choices, seed=0) for i in range(3000)]
    second = [guess(f"test-{i}", n_choices, seed=1) for i in range(3000)]
    shares = np.bincount(first) / len(first)
    assert len(shares) == n_choices
    assert shares == pytest.approx(np.full(n_choices, 1 / n_choices), abs=0.04)
    agreement = np.mean(np.equal(first, second))
    assert agreement == pytest.approx(1 / n_choices, abs=0.04)


def test_sampling_is_seeded_and_leaves_the_callers_random_state(
    loaded: LoadedModel, dataset: datasets.Dataset, predictions: pd.DataFrame
) -> None:
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = run(loaded, dataset, temperature=1.0, seed=1)
    second = run(loaded, dataset, temperature=1.0, seed=2)
    pd.testing.assert_frame_equal(run(loaded, dataset, temperature=1.0, seed=1), first)
    assert (first["text"] != second["text"]).any()
    assert (first["text"] != predictions["text"]).any()
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


class Interrupted(Exception):
    """In place of a kill."""


def test_an_evaluation_can_be_watched(
    loaded: LoadedModel, dataset: datasets.Dataset, predictions: pd.DataFrame
) -> None:
    seen: list[dict[str, float]] = []
    watched = evaluate(
        loaded, dataset, 16, 4, watch=lambda *given: seen.append(dict(enumerate(given)))
    )
    pd.testing.assert_frame_equal(watched.predictions, predictions)
    assert [entry[0] for entry in seen] == [16, 32, 48, 64, 66]
    average = watched.metrics["classes"]["Avg"]
    wanted = [66, 66, *(average[key] for key in ("accuracy", "ci_low", "ci_high"))]
    assert list(seen[-1].values()) == pytest.approx(wanted)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_an_interrupted_evaluation_goes_on_where_it_was(
    loaded: LoadedModel,
    dataset: datasets.Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    temperature: float,
    stop: int,
) -> None:
    options = {"batch_size": 7, "temperature": temperature}
    undisturbed = run(loaded, dataset, **options)
    answers, asked = tmp_path / "answers", 0
    ask = InMemoryModel._batch

    def interrupted(self: InMemoryModel, start: int, requests: Any) -> list[str]:
        nonlocal asked
        if asked == stop:
            raise Interrupted
        asked += 1
        return ask(self, start, requests)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(InMemoryModel, "_batch", interrupted)
        run(loaded, dataset, answers=answers, **options)
    evaluation = evaluate(loaded, dataset, max_new_tokens=4, answers=answers, **options)
    pd.testing.assert_frame_equal(evaluation.predictions, undisturbed)
    assert evaluation.resumed == 7 * stop
    again = evaluate(loaded, dataset, max_new_tokens=4, answers=answers, **options)
    pd.testing.assert_frame_equal(again.predictions, undisturbed)
    assert again.resumed == len(dataset)


def test_answers_to_other_prompts_or_cut_off_are_not_taken(
    loaded: LoadedModel, dataset: datasets.Dataset, problems: list[dict[str, Any]], tmp_path: Path
) -> None:
    run(loaded, dataset, answers=tmp_path, batch_size=7)
    files = sorted(tmp_path.iterdir())
    files[0].write_text("")
    files[1].write_text(files[1].read_text()[:-5])
    settings = {"batch_size": 7, "max_new_tokens": 4, "answers": tmp_path}
    resumed = evaluate(loaded, dataset, **settings).resumed
    kept = [json.loads(file.read_text()) for file in files]
    assert resumed == sum(len(content["answers"]) for content in kept[2:])
    others = make_dataset([{**problem, "question": "Which one?"} for problem in problems])
    assert evaluate(loaded, others, **settings).resumed == 0


def test_a_nan_in_one_question_is_named(problems: list[dict[str, Any]]) -> None:
    model = make_model()
    marked = [*problems[:2], problems[2] | {"question": "Z"}, *problems[3:6]]
    mark = model.tokenizer.convert_tokens_to_ids("Z")

    def poison(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        output.logits[(kwargs["input_ids"] == mark).any(dim=1), :, 5] = float("nan")
        return output

    model.model.register_forward_hook(poison, with_kwargs=True)
    with pytest.raises(RunError, match=r"model toy: .*question test-2 .*not finite") as error:
        run(model, make_dataset(marked))
    assert "\n" not in str(error.value)


def test_infinite_weights_are_an_error(dataset: datasets.Dataset) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.model.language_model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(RunError, match="not finite"):
        run(model, dataset)


@pytest.mark.parametrize("unparsable", ["wrong", "random"])
def test_a_model_without_one_readable_answer_is_an_error(
    dataset: datasets.Dataset, unparsable: str
) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.lm_head.weight.zero_()
    with pytest.raises(RunError, match=r"none of its 66 answers.*QCM-LEA.*vicuna_v1") as error:
        run(model, dataset, unparsable=unparsable)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("unparsable", "skip", r"evaluation\.unparsable='skip' .* wrong, random"),
        ("batch_size", 0, r"evaluation\.batch_size=0"),
        ("max_new_tokens", -1, r"evaluation\.max_new_tokens=-1"),
        ("temperature", -0.5, r"evaluation\.temperature=-0\.5"),
        ("temperature", float("nan"), r"evaluation\.temperature=nan"),
    ],
)
def test_bad_options_are_named(
    loaded: LoadedModel, dataset: datasets.Dataset, option: str, value: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(loaded, dataset, **{option: value})


def test_answers_that_reach_the_limit_are_counted_and_reported(
    loaded: LoadedModel, dataset: datasets.Dataset
) -> None:
    """A larger limit changes the text of cut answers only, and changes that of some."""
    some = dataset.select(range(24))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        short = evaluate(loaded, some, 8, 2, progress=False)
        longer = evaluate(loaded, some, 8, 4, progress=False)
    cut = short.predictions["cut"]
    changed = short.predictions["text"] != longer.predictions["text"]
    assert not (changed & ~cut).any()
    assert (changed & cut).any()
    assert short.metrics["cut"] == pytest.approx(100 * cut.mean())
    assert any("evaluation.max_new_tokens=2" in str(warning.message) for warning in caught)


def test_no_questions_are_an_error(loaded: LoadedModel, dataset: datasets.Dataset) -> None:
    with pytest.raises(UserError, match="no questions"):
        run(loaded, dataset.select([]))


@pytest.mark.parametrize("damage", ["text", "cut", "gone"])
def test_a_broken_image_is_named(
    loaded: LoadedModel, problems: list[dict[str, Any]], damage: str, tmp_path: Path
) -> None:
    Image.new("RGB", (12, 12)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    broken = {
        "text": {"bytes": b"not an image", "path": None},
        "cut": {"bytes": whole[: len(whole) // 2], "path": None},
        "gone": {"bytes": None, "path": str(tmp_path / "gone.png")},
    }
    damaged = [*problems[:5], problems[5] | {"image": broken[damage]}]
    with pytest.raises(UserError, match="image of question test-5 does not decode"):
        run(loaded, make_dataset(damaged))


def test_nothing_is_printed_fetched_or_written(
    loaded: LoadedModel,
    dataset: datasets.Dataset,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError(f"connects to {args}")

    package = Path(lm_eval.__file__).parent

    def installed() -> set[Path]:
        return {path for path in package.rglob("*") if "__pycache__" not in path.parts}

    before = installed()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    capfd.readouterr()
    run(loaded, dataset)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert installed() == before


def test_lm_eval_is_left_as_it_was(loaded: LoadedModel, dataset: datasets.Dataset) -> None:
    import lm_eval.api.task

    logger, bar = logging.getLogger("lm_eval"), lm_eval.api.task.tqdm
    level = logger.level
    run(loaded, dataset.select(range(20)))
    broken = make_dataset([make_problems(1)[0] | {"image": {"bytes": b"?", "path": None}}])
    with pytest.raises(UserError, match="does not decode"):
        run(loaded, broken)
    assert lm_eval.api.task.tqdm is bar
    assert logger.level == level


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("progress", [True, False])
def test_one_bar_on_a_terminal_unless_hidden(
    loaded: LoadedModel,
    dataset: datasets.Dataset,
    monkeypatch: pytest.MonkeyPatch,
    progress: bool,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run(loaded, dataset, progress=progress)
    drawn = {line.split(":")[0] for line in terminal.getvalue().split("\r") if line.strip()}
    assert drawn == ({"toy"} if progress else set())
    assert ("66/66" in terminal.getvalue()) == progress

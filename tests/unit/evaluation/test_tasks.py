"""Tasks of lm-eval from local files, against lm-eval's own runner and each question alone."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
import torch
import yaml
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from PIL import Image

from qvlm.errors import UserError
from qvlm.evaluation.adapter import InMemoryModel
from qvlm.evaluation.scores import scores
from qvlm.evaluation.tasks import evaluate_tasks, load_tasks, require_readable
from qvlm.models import LoadedModel
from tests.helpers.problems import make_model
from tests.helpers.tasks import ANSWERS, PICTURE_TASKS, QUESTIONS, TEXT_TASKS, write_tasks

ALL = [*TEXT_TASKS, *PICTURE_TASKS]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return make_model()


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
        yield str(write_tasks(tmp_path_factory.mktemp("tasks")))


def run(loaded: LoadedModel, folder: str, *names: str, batch_size: int = 4, **options: Any) -> Any:
    settings = {key: options.pop(key) for key in ("shots", "settings") if key in options}
    tasks = load_tasks(names, folder, **settings)
    return evaluate_tasks(loaded, tasks, batch_size, **options)


def values(evaluation: Any) -> dict[tuple[str, str], float]:
    results = evaluation.metrics["tasks"]["results"]
    return {(task, metric): value for task, metric, value, _ in scores(results)}


def test_the_numbers_are_those_of_lm_eval(
    loaded: LoadedModel,
    folder: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluation = run(loaded, folder, *ALL)
    said = capfd.readouterr()
    assert "bootstrap" not in said.out + said.err
    monkeypatch.setattr(evaluator, "add_env_info", lambda _: None)  # it starts processes
    manager = TaskManager(include_path=folder, include_defaults=False)
    expected = lm_eval.simple_evaluate(
        InMemoryModel(loaded, 4), tasks=ALL, task_manager=manager, bootstrap_iters=0
    )
    found = evaluation.metrics["tasks"]
    assert set(found["results"]) == {*ALL}
    for task, metrics in expected["results"].items():
        for name, value in metrics.items():
            if "stderr" not in name:
                assert found["results"][task][name] == value
    assert found["n-samples"]["toy_choice"] == {"original": 5, "effective": 5}
    errors = {task: error for task, _, _, error in scores(found["results"])}
    assert errors["toy_likelihood"] > 0
    assert errors["toy_rolling"] is None  # lm-eval gives none


@pytest.mark.parametrize("batch_size", [3, 64])
def test_batches_change_nothing(loaded: LoadedModel, folder: str, batch_size: int) -> None:
    alone = run(loaded, folder, *ALL, batch_size=1)
    batched = run(loaded, folder, *ALL, batch_size=batch_size)
    assert values(batched) == pytest.approx(values(alone), rel=1e-4)
    columns = ["task", "doc_id", "filter", "requests", "target"]
    assert batched.predictions[columns].equals(alone.predictions[columns])
    for one, other in zip(
        alone.predictions["responses"], batched.predictions["responses"], strict=True
    ):
        for first, second in zip(json.loads(one), json.loads(other), strict=True):
            assert (
                first == pytest.approx(second, abs=1e-3)
                if not isinstance(first, str)
                else (first == second)
            )
    texts = alone.predictions.query("task == 'toy_pictures'")["responses"]
    assert texts.nunique() > 3  # the comparison says something


def test_an_answer_ends_before_a_text_that_ends_it(loaded: LoadedModel, folder: str) -> None:
    ended = run(loaded, folder, "toy_generate")
    whole = run(loaded, folder, "toy_generate", settings={"until": []})
    found = [json.loads(text)[0] for text in ended.predictions["responses"]]
    every = [json.loads(text)[0] for text in whole.predictions["responses"]]
    assert found == [text.partition("C")[0] for text in every]
    assert found != every
    short = run(loaded, folder, "toy_generate", settings={"until": [], "max_gen_toks": 1})
    assert [json.loads(text)[0] for text in short.predictions["responses"]] == [
        text[:1] for text in every
    ]


def test_each_picture_takes_its_place(loaded: LoadedModel) -> None:
    """Two pictures among words, against one forward pass without padding."""
    red, blue = Image.new("RGB", (12, 12), "red"), Image.new("RGB", (12, 12), "blue")
    texts = ["a <image> b c <image>", "<image> d"]

    def ask(first: list[Image.Image], second: list[Image.Image]) -> list[float]:
        pairs = zip(texts, (first, second), strict=True)
        requests = [
            Instance("loglikelihood", {"question_id": text}, (text, " e", {"visual": own}), 0)
            for text, own in pairs
        ]
        return [value for value, _ in InMemoryModel(loaded, 2).loglikelihood(requests)]

    found = ask([red, blue], [blue])
    assert ask([blue, red], [blue])[0] != pytest.approx(found[0], abs=1e-4)
    assert ask([blue, red], [blue])[1] == pytest.approx(found[1], abs=1e-4)

    def ids(text: str) -> list[int]:
        return loaded.tokenizer(text, add_special_tokens=False)["input_ids"]

    image = [loaded.model.config.image_token_id] * 4
    row = [loaded.tokenizer.bos_token_id, *ids("a"), *image, *ids("b c"), *image, *ids("e")]
    pixels = loaded.image_processor([red, blue], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([row[:-1]]), pixel_values=pixels).logits[0, -1]
    assert float(logits.log_softmax(0)[row[-1]]) == pytest.approx(found[0], abs=1e-4)


def test_limit_shots_and_template_reach_the_prompts(loaded: LoadedModel, folder: str) -> None:
    def prompts(**options: Any) -> list[str]:
        frame = run(loaded, folder, "toy_choice", limit=2, **options).predictions
        return [json.loads(text)[0][0] for text in frame["requests"]]

    assert prompts() == list(QUESTIONS[:2])
    (first, _) = prompts(shots=1)
    example, _, asked = first.rpartition("\n\n")
    assert asked == QUESTIONS[0]
    assert example in {f"{q} {ANSWERS[row % 3]}" for row, q in enumerate(QUESTIONS)}
    (first, _) = prompts(chat_template=True)
    assert first.endswith(f" USER: {QUESTIONS[0]} ASSISTANT:")
    (first, _) = prompts(chat_template=True, shots=1)
    assert first.count("USER: ") == 1  # one request, which holds the example


def test_kept_answers_are_reused(loaded: LoadedModel, folder: str, tmp_path: Path) -> None:
    first = run(loaded, folder, "toy_generate", "toy_pictures", answers=tmp_path / "kept")
    again = run(loaded, folder, "toy_generate", "toy_pictures", answers=tmp_path / "kept")
    assert (first.resumed, again.resumed) == (0, 10)
    assert first.predictions.equals(again.predictions)


def test_samples_survive_parquet_without_pictures(
    loaded: LoadedModel, folder: str, tmp_path: Path
) -> None:
    frame = run(loaded, folder, *PICTURE_TASKS).predictions
    frame.to_parquet(tmp_path / "samples.parquet")
    assert (tmp_path / "samples.parquet").stat().st_size < 20_000
    (context, option), _ = json.loads(frame.query("task == 'toy_picture_choice'")["requests"][5])
    assert (context, option) == (QUESTIONS[0], " a")


def with_task(folder: Path, **changes: Any) -> str:
    write_tasks(folder)
    task = yaml.safe_load((folder / "toy_pictures.yaml").read_text()) | {"task": "odd"} | changes
    (folder / "odd.yaml").write_text(yaml.safe_dump(task))
    return str(folder)


def test_what_cannot_run_is_refused_by_name(loaded: LoadedModel, tmp_path: Path) -> None:
    blind = make_model()
    blind.image_processor = None
    tasks = load_tasks(["odd"], with_task(tmp_path / "a"))
    with pytest.raises(UserError, match="task=odd has images, and model toy reads none"):
        require_readable(blind, tasks)
    with pytest.raises(UserError, match="task=odd runs code that the model writes"):
        load_tasks(["odd"], with_task(tmp_path / "b", unsafe_code=True))
    missing = with_task(tmp_path / "c", dataset_kwargs={"data_files": "nowhere.parquet"})
    with pytest.raises(UserError, match="task=odd cannot be loaded"):
        load_tasks(["odd"], missing)
    more = with_task(tmp_path / "d", doc_to_text="<image> <image> <image>")
    with pytest.raises(UserError, match=r"question \d of odd names 3 images and has 2"):
        run(loaded, more, "odd", batch_size=64)


@pytest.mark.slow
def test_an_unknown_task_is_told_what_is_near(folder: str) -> None:
    with pytest.raises(UserError, match="task=arc_eazy names no task .* arc_easy"):
        load_tasks(["arc_eazy"], folder)

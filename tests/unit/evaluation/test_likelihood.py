"""Log-likelihoods through lm-eval against a forward pass of each text alone, without padding."""

from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from PIL import Image

from qvlm.errors import RunError, UserError
from qvlm.evaluation import likelihood
from qvlm.evaluation.adapter import InMemoryModel
from qvlm.models import LoadedModel
from tests.helpers.problems import make_model, make_problems

BATCH_SIZES = [1, 3, 64]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    model = make_model()
    with torch.no_grad():  # every word has a probability of its own
        generator = torch.Generator().manual_seed(5)
        weight = model.model.lm_head.weight
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model


def instance(kind: str, arguments: tuple[Any, ...], index: int = 0) -> Instance:
    doc = {"question_id": f"q{index}"}
    return Instance(request_type=kind, doc=doc, arguments=arguments, idx=0)  # type: ignore[arg-type]


def choices(count: int = 14) -> list[Instance]:
    """Options of problems after their prompts, some with an image, in lm-eval's two forms."""
    requests = []
    for index, problem in enumerate(make_problems(count, seed=3)):
        prompt = make_model().prompting.prompt(problem)
        for text in (" q r s", " t", ""):
            given: tuple[Any, ...] = (prompt, text)
            if problem["image"] is not None:
                given += ({"visual": [problem["image"]]},)
            requests.append(instance("loglikelihood", given, index))
    requests.append(instance("loglikelihood", ("", "a b c")))
    requests.append(instance("loglikelihood", ("a  ", "b")))
    return requests


def alone(loaded: LoadedModel, ids: list[int], scored: int, image: Any) -> tuple[float, bool]:
    """Scores the last tokens of a text by itself, in NumPy."""
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
    if image is not None:
        inputs["pixel_values"] = loaded.image_processor([image], return_tensors="pt")[
            "pixel_values"
        ]
    with torch.no_grad():
        logits = loaded.model(**inputs).logits[0].double().numpy()
    total, greedy = 0.0, True
    for position in range(len(ids) - scored, len(ids)):
        row = logits[position - 1]
        total += row[ids[position]] - np.log(np.exp(row - row.max()).sum()) - row.max()
        greedy &= bool(row.argmax() == ids[position])
    return total, greedy


def expected_of(loaded: LoadedModel, request: Instance) -> tuple[float, bool]:
    context, text, *extra = request.args
    image = extra[0]["visual"][0] if extra else None
    tokenizer = loaded.tokenizer
    image_token = [loaded.model.config.image_token_id] * 4  # (12 / 6)^2 patches

    def encode(whole: str) -> list[int]:
        pieces = [
            tokenizer(part, add_special_tokens=False)["input_ids"]
            for part in whole.split("<image>")
        ]
        ids = [tokenizer.bos_token_id, *pieces[0]]
        for piece in pieces[1:]:
            ids += image_token + piece
        return ids

    ids = encode(context + text)
    return alone(loaded, ids, len(ids) - len(encode(context.rstrip())), image)


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_continuations_score_as_each_alone(loaded: LoadedModel, batch_size: int) -> None:
    requests = choices()
    found = InMemoryModel(loaded, batch_size, progress=False).loglikelihood(requests)
    expected = [expected_of(loaded, request) for request in requests]
    assert [value for value, _ in found] == pytest.approx([v for v, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len({round(value, 3) for value, _ in found}) > 20  # the comparison says something
    assert found[2] == (0.0, True)  # of an empty continuation


def test_the_picture_counts(loaded: LoadedModel) -> None:
    black = Image.new("RGB", (12, 12))
    white = Image.new("RGB", (12, 12), "white")
    requests = [
        instance("loglikelihood", ("USER: <image> a", " b c", {"visual": [image]}))
        for image in (black, white)
    ]
    (first, _), (second, _) = InMemoryModel(loaded, 2).loglikelihood(requests)
    assert abs(first - second) > 1e-3


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("words", [1, 7, 31])
def test_a_text_is_scored_in_windows_that_see_all_they_can(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, batch_size: int, words: int
) -> None:
    length = 8
    monkeypatch.setattr(likelihood, "context_length", lambda _: length)
    texts = [" ".join("abcdefghijk"[(3 * i + j) % 11] for i in range(words + j)) for j in range(3)]
    requests = [instance("loglikelihood_rolling", (text,)) for text in texts]
    found = InMemoryModel(loaded, batch_size).loglikelihood_rolling(requests)
    for text, value in zip(texts, found, strict=True):
        ids = [loaded.tokenizer.bos_token_id]
        ids += loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        total, at = 0.0, 1
        while at < len(ids):
            end = min(at + length, len(ids))
            begin = max(0, end - length - 1)
            total += alone(loaded, ids[begin:end], end - at, None)[0]
            at = end
        assert value == pytest.approx(total, abs=1e-3)


def test_a_context_that_is_too_long_loses_its_beginning(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "context_length", lambda _: 6)
    long, short = "a b c d e f g h", "d e f g h"
    model = InMemoryModel(loaded, 2)
    with pytest.warns(RuntimeWarning, match="toy: 1 of 1 texts do not fit its context of 6"):
        (found,) = model.loglikelihood([instance("loglikelihood", (long, " i j"))])
    ids = loaded.tokenizer(f"{short} i j", add_special_tokens=False)["input_ids"]
    assert found[0] == pytest.approx(alone(loaded, ids, 2, None)[0], abs=1e-4)
    with pytest.raises(UserError, match="question q0 has 10 tokens and does not fit its"):
        model.loglikelihood([instance("loglikelihood", ("a", " b c d e f g h i"))])


def test_a_broken_model_names_the_text(loaded: LoadedModel) -> None:
    broken = make_model()
    with torch.no_grad():
        broken.model.lm_head.weight[7] = float("nan")
    with pytest.raises(RunError, match="model toy: the logits for text of q9 are not finite"):
        InMemoryModel(broken, 4).loglikelihood([instance("loglikelihood", ("a", " b"), 9)])


def test_lm_eval_ranks_options_with_pictures(loaded: LoadedModel) -> None:
    """Multiple choice with images, which lm-eval's own multimodal model does not serve."""
    import datasets
    import lm_eval.evaluator
    from lm_eval.api.task import ConfigurableTask

    problems = make_problems(9, seed=8)
    rows = datasets.Dataset.from_list(
        [
            {"text": loaded.prompting.prompt(p), "choices": p["choices"], "answer": p["answer"]}
            for p in problems
        ]
    )
    pictures = {loaded.prompting.prompt(p): p["image"] for p in problems}

    def visual(doc: dict[str, Any]) -> list[Any]:
        return [image for image in [pictures[doc["text"]]] if image is not None]

    task = ConfigurableTask(
        config={
            "task": "ranked",
            "custom_dataset": lambda **_: {"test": rows},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_image": visual,
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}],
        }
    )
    results = lm_eval.evaluator.evaluate(
        InMemoryModel(loaded, 4, progress=False), {"ranked": task}, bootstrap_iters=0
    )
    right = []
    for problem in problems:
        extra = () if problem["image"] is None else ({"visual": [problem["image"]]},)
        prompt = loaded.prompting.prompt(problem)
        scores = [
            expected_of(loaded, instance("loglikelihood", (prompt, f" {choice}", *extra)))[0]
            for choice in problem["choices"]
        ]
        right.append(int(np.argmax(scores)) == problem["answer"])
    assert results["results"]["ranked"]["acc,none"] == pytest.approx(np.mean(right))
    assert 0 < sum(right) < len(right)

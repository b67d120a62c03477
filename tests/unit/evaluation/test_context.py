"""Prompts beside the model's context: kept whole, shortened with a warning, or refused."""

import warnings
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from PIL import Image

from qvlm.errors import UserError
from qvlm.evaluation import likelihood
from qvlm.evaluation.adapter import InMemoryModel
from qvlm.evaluation.evaluator import evaluate
from qvlm.models import LoadedModel
from tests.helpers.problems import make_dataset, make_model, make_problems

LENGTH = 12
IMAGE = Image.new("RGB", (12, 12), "red")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """A model with 12 positions. An image takes 4 of them, a word and the bos token one each."""
    monkeypatch.setattr(likelihood, "context_length", lambda _: LENGTH)
    return make_model()


def ask(
    loaded: LoadedModel, prompt: str, limit: int, *images: Image.Image, shorten: bool = False
) -> tuple[list[int], int]:
    """Returns the prompt that the model sees and the number of tokens that it generates at most."""
    seen: list[Any] = []
    settings = {"until": [], "max_gen_toks": limit}
    arguments: Any = (prompt, settings, {"visual": [*images]})
    request = Instance("generate_until", {"question_id": "q7"}, arguments, 0)
    generate = loaded.model.generate

    def spy(**given: Any) -> Any:
        seen.append((given["input_ids"][0].tolist(), given["max_new_tokens"]))
        return generate(**given)

    loaded.model.generate = spy  # type: ignore[method-assign]
    InMemoryModel(loaded, 2, progress=False, shorten=shorten).generate_until([request])
    found: tuple[list[int], int] = seen[0]
    return found


def ids(loaded: LoadedModel, prompt: str, *images: Image.Image) -> list[int]:
    return loaded.token_ids([prompt], [images])[0]


@pytest.mark.parametrize("limit", [4, LENGTH, 100])
@pytest.mark.parametrize(("words", "images"), [(11, ()), (7, (IMAGE,))])
def test_a_prompt_that_fits_is_whole_and_its_answer_ends_with_the_context(
    loaded: LoadedModel, limit: int, words: int, images: tuple[Image.Image, ...]
) -> None:
    prompt = "<image> " * len(images) + "a " * words
    assert ask(loaded, prompt, limit, *images) == (ids(loaded, prompt, *images), 1)
    shorter = prompt[:-4]
    assert ask(loaded, shorter, limit, *images) == (ids(loaded, shorter, *images), 3)
    assert ask(loaded, shorter, 2, *images)[1] == 2


@pytest.mark.parametrize("shorten", [True, False])
@pytest.mark.parametrize(("words", "images"), [(12, ()), (8, (IMAGE,))])
def test_a_prompt_without_room_for_an_answer_is_refused_by_name(
    loaded: LoadedModel, shorten: bool, words: int, images: tuple[Image.Image, ...]
) -> None:
    prompt = "<image> " * len(images) + "a " * words
    limit = LENGTH if shorten else 4  # lm-eval cuts a text unless the answer may be as long
    with pytest.raises(UserError, match="toy: question q7 has 13 tokens and does not fit its"):
        ask(loaded, prompt, limit, *images, shorten=shorten)


def test_an_answer_does_not_depend_on_the_others_of_its_batch(loaded: LoadedModel) -> None:
    """A long prompt leaves little room for its own answer, and takes none from a short one's."""
    prompts = ["a b c d e f g h i j", "a b", "g h i j k l m n", "c d"]
    requests = [
        Instance("generate_until", {"question_id": prompt}, (prompt, {"max_gen_toks": 8}), 0)  # type: ignore[arg-type]
        for prompt in prompts
    ]

    def answers(batch_size: int) -> list[int]:
        model = InMemoryModel(loaded, batch_size, progress=False, shorten=False)
        return [len(ids(loaded, text)) for text in model.generate_until(requests)]

    alone = answers(1)
    assert alone[1] > alone[0]
    assert answers(4) == alone


@pytest.mark.parametrize("scoring", ["generate", "rank"])
def test_an_evaluation_refuses_a_question_that_is_too_long(
    loaded: LoadedModel, scoring: str
) -> None:
    asked = make_dataset([{**make_problems(1)[0], "image": None, "question": "g " * 20}])
    with pytest.raises(UserError, match=r"question test-0 has \d+ tokens and does not fit its"):
        evaluate(loaded, asked, 2, 4, scoring=scoring)


def test_a_text_of_a_task_loses_its_beginning_with_a_warning(loaded: LoadedModel) -> None:
    long = "a b c d e f g h i j k"
    with pytest.warns(RuntimeWarning, match="toy: 1 of 1 texts do not fit its context of 12"):
        seen = ask(loaded, long, 4, shorten=True)
    assert seen == (ids(loaded, long)[-8:], 4)
    scored = [
        Instance("loglikelihood", {"question_id": "q"}, (text, " b"), 0)  # type: ignore[arg-type]
        for text in (long + long, "a")
    ]
    model = InMemoryModel(loaded, 2, progress=False)
    with pytest.warns(RuntimeWarning, match="toy: 1 of 2 texts do not fit"):
        model.loglikelihood(scored)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ask(loaded, "a b c", 4, shorten=True)
        model.loglikelihood(scored[1:])

"""What requests hold: pictures of any mode, and settings of generation."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lm_eval import tasks
from lm_eval.api.instance import Instance
from PIL import Image

from qvlm.data.images import to_rgb
from qvlm.errors import UserError
from qvlm.evaluation.request import Generation, images
from tests.helpers.families import Loaded
from tests.helpers.pictures import ODD_MODES, odd_picture
from tests.helpers.problems import make_model


def request(settings: dict[str, Any], *visual: Any) -> Instance:
    arguments: Any = ("USER: a", settings, {"visual": [*visual]})
    return Instance("generate_until", {"question_id": "q7"}, arguments, 0)


def encoded(image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "TIFF")
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize("mode", ODD_MODES)
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_every_route_shows_a_model_the_same_pixels(mode: str, fit: str) -> None:
    image = odd_picture(mode)
    loaded = replace(make_model(), image_fit=fit)
    seen = [*images(request({}, image, encoded(image))), to_rgb(image)]
    assert len({each.tobytes() for each in seen}) == 1
    batches = [loaded.collate([[1]], [[each]])["pixel_values"] for each in (image, *seen)]
    assert all(torch.equal(batch, batches[0]) for batch in batches)


@pytest.mark.parametrize("mode", ODD_MODES)
def test_a_picture_of_any_mode_keeps_what_it_shows(mode: str) -> None:
    """Transparent pixels have their own color, and wide values are neither white nor black."""
    red = np.asarray(images(request({}, odd_picture(mode)))[0])[..., 0]
    assert abs(int(red[0, 0]) - 40) <= 1 and abs(int(red[-1, -1]) - 200) <= 1


@pytest.mark.parametrize("mode", ODD_MODES)
def test_a_family_sees_the_same_pixels(mode: str, tiny: Loaded) -> None:
    loaded, image = tiny("qwen2_vl"), odd_picture(mode)
    prompt = ["".join(loaded.prompting.around(1))]
    first, second = (loaded.encode_prompts(prompt, [[each]]) for each in (image, to_rgb(image)))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, r"num_beams=4 is not supported\. Leave it out or give 1"),
        ({"repetition_penalty": 1.3}, r"repetition_penalty=1\.3 .* give 1\.0"),
        ({"no_repeat_ngram_size": 3}, r"no_repeat_ngram_size=3 .* give 0"),
        ({"min_p": 0.1}, r"min_p=0\.1 .* give 0\.0"),
        ({"max_length": 5}, r"max_length=5 .* Choose from: until, .*max_gen_toks"),
        ({"temprature": 0.7}, r"temprature=0\.7 .* Choose from: until, do_sample, temperature"),
        ({"do_sample": True, "temperature": 0.0}, r"temperature=0\.0 with do_sample=True"),
        ({"do_sample": "false", "temperature": 0.7}, "do_sample=false is not true or false"),
        ({"until": ["a", 3]}, "until=3 is not texts"),
        ({"do_sample": True, "top_k": -1}, "top_k=-1 is not a whole number of at least 0"),
        ({"do_sample": True, "top_p": 1.5}, r"top_p=1\.5 is not a finite number from 0 to 1"),
        ({"do_sample": True, "temperature": "hot"}, "temperature=hot is not a finite number"),
        ({"max_gen_toks": 0}, "max_gen_toks=0 is not a whole number of at least 1"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Generation.of(request({"until": [], **settings}))


def test_settings_that_change_nothing_are_accepted() -> None:
    neutral = {"num_beams": 1, "repetition_penalty": 1, "no_repeat_ngram_size": 0, "min_p": None}
    given = {"until": ["x"], "do_sample": False, "max_gen_toks": 8}
    assert Generation.of(request({**given, **neutral})) == Generation.of(request(given))


def test_sampling_without_a_temperature_has_temperature_one() -> None:
    found = Generation.of(request({"do_sample": True, "temperature": None, "top_k": 5}))
    assert found.sampling == {"do_sample": True, "temperature": 1.0, "top_k": 5, "top_p": 1.0}
    assert Generation.of(request({"temperature": 0.7})).sampling["temperature"] == 0.7


class _AnyTag(yaml.SafeLoader):
    """Reads YAML files whose tags name functions."""


_AnyTag.add_multi_constructor("!", lambda *_: None)


def test_the_settings_of_lm_evals_own_tasks_are_accepted() -> None:
    files = [file.read_text("utf-8") for file in Path(tasks.__file__).parent.rglob("*.yaml")]
    written = [yaml.load(text, _AnyTag) for text in files if "\ngeneration_kwargs:" in text]
    shipped = [task["generation_kwargs"] for task in written if task["generation_kwargs"]]
    assert len(shipped) > 100
    for settings in shipped:
        Generation.of(request(settings))

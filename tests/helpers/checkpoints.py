"""Reads stand-ins of original checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvlm.data.prompts import Prompting
from qvlm.errors import UserError
from qvlm.models import LoadedModel, load_model
from tests.helpers.standins import StandIn

PROBLEM = {
    "image": Image.new("RGB", (300, 200), (200, 30, 90)),
    "question": "Which is air?",
    "choices": ["air", "a rock"],
    "answer": 0,
    "hint": "",
    "lecture": "",
    "solution": "",
}


PLAIN = {**PROBLEM, "image": None}


STABLELM = Prompting("CQM-A", "stablelm")


PROMPTINGS = {
    "moe_llava": STABLELM,
    "moe_llava_phi2": Prompting("CQM-A", "phi"),
    "moe_llava_qwen": Prompting("CQM-A", "qwen"),
}


def read(standin: StandIn, **options: Any) -> LoadedModel:
    options.setdefault("vision_tower", standin.tower and str(standin.tower))
    options.setdefault("prompting", PROMPTINGS.get(standin.folder.name))
    return load_model(standin.folder, "real", **options)


def change(file: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None deletes one."""
    content = {**json.loads(file.read_text()), **changes}
    kept = {key: value for key, value in content.items() if value is not None}
    file.write_text(json.dumps(kept))


def refused(load: Callable[[], object], *words: str) -> None:
    with pytest.raises(UserError) as refusal:
        load()
    message = str(refusal.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message

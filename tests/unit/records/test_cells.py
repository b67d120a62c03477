"""Versions of the code may add options; a cell stays the same cell."""

from copy import deepcopy
from typing import Any

import pytest

from qvlm.config.schema import influences
from qvlm.records.cells import cell_of
from tests.helpers.configs import load


def run(*words: str) -> dict[str, Any]:
    return {"influences": influences(load(*words)), "files_hashed": {"model": "w"}}


def without(given: dict[str, Any], *path: str) -> dict[str, Any]:
    """The same of an older version, which did not have the option at the end of the path."""
    older = deepcopy(given)
    part = older["influences"]
    for key in path[:-1]:
        part = part[key]
    del part[path[-1]]
    return older


@pytest.mark.parametrize(
    "path",
    [
        ("method", "veo_checkpointing"),
        ("quantizer", "first_token"),
        ("quantizer", "language", "group_size"),
        ("evaluation", "temperature"),
        ("calibration", "images"),
    ],
)
def test_an_option_that_is_younger_has_its_default(path: tuple[str, ...]) -> None:
    newer = run("method=qvlm", "bits=w4a4")
    assert cell_of(without(newer, *path)) == cell_of(newer)


@pytest.mark.parametrize(
    "word",
    [
        *("method.veo_checkpointing=true", "quantizer.first_token=float", "calibration.seed=1"),
        *("calibration.images=any", "bits=w6a6", "method=awq", "evaluation.limit=9", "seed=1"),
    ],
)
def test_another_value_is_another_cell(word: str) -> None:
    assert cell_of(run("method=qvlm", "bits=w4a4", word)) != cell_of(
        run("method=qvlm", "bits=w4a4")
    )


def test_weights_are_part_of_a_cell_and_code_is_not() -> None:
    one = run("method=fp", "bits=fp")
    assert cell_of({**one, "code": "other"}) == cell_of(one)
    assert cell_of({**one, "files_hashed": {"model": "v"}}) != cell_of(one)


@pytest.mark.parametrize("target", ["mine.Method", "qvlm.methods.gone.Gone", "qvlm.methods.rtn.No"])
def test_a_method_that_is_not_here_has_no_defaults(target: str) -> None:
    one = run("method=rtn", "bits=w4a4")
    one["influences"]["method"] = {"_target_": target, "strength": 3}
    other = deepcopy(one)
    other["influences"]["method"]["strength"] = 4
    assert cell_of(one) != cell_of(other)

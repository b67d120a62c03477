"""Every wrong value is refused, and the influences hold what changes a number."""

from pathlib import Path

import pytest

from qvlm.config.schema import RunConfig, canonical, influences
from qvlm.errors import UserError
from qvlm.records.record import identify
from tests.helpers.configs import load


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+foo=1", ["foo", "bits", "calibration"]),
        ("+quantizer.foo=1", ["quantizer.foo", "vision_tower"]),
        ("+quantizer.weight.foo=1", ["quantizer.weight.foo", "group_size"]),
        ("~seed", ["seed"]),
        ("calibration.samples=-1", ["calibration.samples", "-1", "at least 1"]),
        ("calibration.samples=0", ["calibration.samples", "at least 1"]),
        ("calibration.batch_size=0", ["calibration.batch_size"]),
        ("calibration.images=some", ["calibration.images", "some", "only, any, none"]),
        ("bits.weights=1", ["bits.weights", "from 2 to 8"]),
        ("bits.activations=9", ["bits.activations", "from 2 to 8"]),
        ("bits.weights=null", ["bits.weights", "bits.activations", "null"]),
        ("evaluation.unparsable=maybe", ["evaluation.unparsable", "wrong", "random"]),
        ("evaluation.limit=0", ["evaluation.limit"]),
        ("evaluation.temperature=-1", ["evaluation.temperature"]),
        ("evaluation.temperature=nan", ["evaluation.temperature"]),
        ("tracking.mode=loud", ["tracking.mode", "offline", "online", "off"]),
        ("model.dtype=int8", ["model.dtype", "float32"]),
        ("threads=0", ["threads"]),
        ("data=folder", ["data.source"]),
        ("method._target_=null", ["method._target_"]),
    ],
)
def test_a_wrong_value_is_refused_by_name(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        load(override)
    message = str(refusal.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_full_precision_has_one_name() -> None:
    cells = [
        canonical(load(*overrides))
        for overrides in (
            ["method=fp", "bits=w4a4"],
            ["method=fp", "bits=w6a6"],
            ["method=rtn", "bits=fp"],
            ["method=fp", "bits=fp", "calibration.samples=3", "quantizer.p=1"],
        )
    ]
    assert all((cell.method_name, cell.bits.label) == ("fp", "FP") for cell in cells)
    assert len({identify(influences(cell), "code", {}) for cell in cells}) == 1
    assert identify(influences(load("method=rtn")), "code", {}) not in {
        identify(influences(cells[0]), "code", {})
    }


def identity(*overrides: str) -> str:
    return identify(influences(load(*overrides)), "code", {"model": "weights"})


@pytest.mark.parametrize(
    "override",
    [
        *("model=mini_moe_llava", "model.conversation=stablelm", "bits=w6a6", "method.extra=1"),
        *("quantizer.p=1", "quantizer.language.granularity=per_tensor", "seed=1", "data.seed=1"),
        *("calibration.samples=63", "evaluation.limit=5", "evaluation.unparsable=random"),
        *("quantizer.vision_tower=false", "evaluation.batch_size=1", "execution=exact"),
        "model.dtype=float32",
    ],
)
def test_what_changes_a_number_changes_the_identity(override: str) -> None:
    assert identity(override) != identity()


@pytest.mark.parametrize(
    "override",
    [
        *("tracking=off", "results_dir=/elsewhere", "device=cpu", "threads=1", "force=true"),
        *("group=other", "seed=0", "bits=w4a4", "model.path=/copy", "model.stands_for=null"),
    ],
)
def test_what_changes_no_number_keeps_the_identity(override: str) -> None:
    assert identity(override) == identity()


def test_the_identity_is_of_the_files_too() -> None:
    parts = influences(load())
    hashes = {
        identify(parts, "code", {"model": "a"}),
        identify(parts, "code", {"model": "b"}),
        identify(parts, "changed", {"model": "a"}),
    }
    assert len(hashes) == 3
    assert all(len(value) == 64 for value in hashes)


def test_the_schema_is_usable_without_hydra(tmp_path: Path) -> None:
    config = load()
    assert config.runs_dir == Path("results/runs")
    with pytest.raises(UserError, match=r"method\._target_"):
        RunConfig()

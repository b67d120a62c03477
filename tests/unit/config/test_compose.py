"""Every option composes, and none is hidden."""

import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import yaml
from hydra.types import RunMode

from qvlm.config.compose import CONF, from_hydra
from tests.helpers.configs import composed, load

pytestmark = pytest.mark.slow

GROUPS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in CONF.iterdir()
    if folder.is_dir()
}
CHOICES = [
    (group, option)
    for group, options in GROUPS.items()
    for option in options
    if "@package _global_" not in (CONF / group / f"{option}.yaml").read_text()
]
NEEDED = {
    **{option: ["data.source=somewhere"] for option in ("folder", "official")},
    "hf": ["model.path=somewhere"],
}  # what an option leaves to the user


def test_the_groups_of_the_command_line_exist() -> None:
    assert set(GROUPS) == {
        *("model", "method", "bits", "quantizer", "data", "calibration"),
        *("evaluation", "tracking", "launcher", "experiment", "scale"),
    }
    bits = ["fp", "w2a4", "w3a3", "w4a4", "w4a8", "w6a6", "w8a4", "w8a8"]
    assert GROUPS["bits"] == bits
    assert {"mini_llava", "mini_moe_llava"} <= set(GROUPS["model"])
    assert {"fp", "rtn"} <= set(GROUPS["method"])


@pytest.mark.parametrize(("group", "option"), CHOICES)
def test_every_option_composes(group: str, option: str) -> None:
    config = load(f"{group}={option}", *NEEDED.get(option, []))
    written = yaml.safe_load((CONF / group / f"{option}.yaml").read_text())
    for key, value in written.items():
        if key == "defaults":  # an option that varies another one of its group
            continue
        if not isinstance(value, dict) and "${" not in str(value) and value != "???":
            node = getattr(config, group)
            value = os.path.expanduser(value) if str(value).startswith("~") else value
            assert (node[key] if isinstance(node, dict) else getattr(node, key)) == value


@pytest.mark.parametrize("model", GROUPS["model"])
@pytest.mark.parametrize("method", GROUPS["method"])
def test_every_pair_of_model_and_method_composes(model: str, method: str) -> None:
    config = load(f"model={model}", f"method={method}", *NEEDED.get(model, []))
    assert config.model.name == model
    assert config.method_name == method


@pytest.mark.parametrize("experiment", GROUPS["experiment"])
@pytest.mark.parametrize("scale", GROUPS["scale"])
def test_every_experiment_sweeps_over_known_options(experiment: str, scale: str) -> None:
    with composed(f"experiment={experiment}", f"scale={scale}") as config:
        assert config.hydra.mode is RunMode.MULTIRUN
        assert from_hydra(config).group == experiment
        for group, options in config.hydra.sweeper.params.items():
            assert "." in group or set(options.split(",")) <= set(GROUPS[group])


def test_the_defaults_are_the_documented_cell() -> None:
    config = load()
    assert (config.model.name, config.method_name) == ("mini_llava", "rtn")
    assert config.bits.label == "W4A4"
    assert config.quantizer.weight.granularity == "per_group"
    assert config.quantizer.weight.group_size == config.model.weight_group_size == 64
    assert config.quantizer.language.granularity == "per_channel"
    assert config.quantizer.language.group_size is None
    assert config.quantizer.vision.granularity == "per_token"
    assert config.quantizer.vision_tower
    assert (config.calibration.split, config.calibration.samples) == ("train", 64)
    assert (config.evaluation.unparsable, config.evaluation.temperature) == ("wrong", 0.0)
    assert config.tracking.mode == "offline"


def test_the_papers_scale_is_its_checkpoints_on_the_real_data() -> None:
    config = load("scale=paper")
    assert (config.model.name, config.data.name) == ("llava_13b", "scienceqa")
    assert config.evaluation.max_new_tokens == 1024
    assert config.results_dir == "results/paper"
    assert load("scale=paper", "model=llava_7b").model.name == "llava_7b"
    with composed("experiment=table2", "scale=paper") as composition:
        assert composition.hydra.sweeper.params.model == "llava_13b,moe_llava"


def test_interpolations_follow_what_they_point_at() -> None:
    config = load("seed=7", "results_dir=elsewhere", "model.weight_group_size=32")
    assert config.calibration.seed == 7
    assert config.tracking.dir == "elsewhere/wandb"
    assert config.quantizer.weight.group_size == 32
    assert config.data.seed == 0  # the questions stay the same


def test_no_option_is_hidden() -> None:
    """Every field of the schema is a key of the composed defaults, where --cfg job shows it."""

    def keys(node: Any) -> Iterator[str]:
        for entry in fields(node):
            value = getattr(node, entry.name)
            if is_dataclass(value):
                yield from (f"{entry.name}.{key}" for key in keys(value))
            else:
                yield entry.name

    written = yaml.safe_load((CONF / "config.yaml").read_text())
    for entry in written["defaults"]:
        if isinstance(entry, dict):
            group, option = next(iter(entry.items()))
            if (path := CONF / group / f"{option}.yaml").is_file():
                written[group] = yaml.safe_load(path.read_text())
    for key in keys(load()):
        node: Any = written
        for part in key.split("."):
            assert part in node, f"{key} is in no YAML"
            node = node[part]


def test_every_option_says_what_it_is_for() -> None:
    """A YAML that is not plain from its name opens with a comment."""
    for group in ("model", "method", "data", "tracking", "experiment", "quantizer", "scale"):
        for path in (CONF / group).glob("*.yaml"):
            assert path.read_text().startswith("#"), path

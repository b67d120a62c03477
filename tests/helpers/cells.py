"""Fixtures for cells that run in seconds: a tiny checkpoint, small splits, a recording tracker."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from qvlm.cell import inputs, pipeline
from qvlm.cell.identity import Cell
from qvlm.config.schema import RunConfig, TrackingConfig
from qvlm.data.sources import Split
from qvlm.records.record import Record
from qvlm.records.tracking import Tracker
from tests.helpers.configs import load
from tests.helpers.problems import make_dataset, make_model, make_problems
from tests.helpers.splits import split_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA on disk."""
    folder = tmp_path_factory.mktemp("checkpoint")
    loaded = make_model()
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    loaded.image_processor.save_pretrained(folder)
    return folder


def run(config: RunConfig) -> Path:
    """Runs the cell of a configuration, and returns the folder that it leaves."""
    return pipeline.run_cell(Cell.of(config))


SPLITS = {"test": make_dataset(make_problems(12, seed=1)), "train": make_dataset(make_problems(20))}


class Tracked(list[tuple[Any, ...]]):
    """The calls of the tracker."""


@pytest.fixture
def tracked(monkeypatch: pytest.MonkeyPatch) -> Tracked:
    """Replaces data and tracking."""
    calls = Tracked()

    def load_split(
        source: str, split: str, limit: int | None, seed: int, with_images: bool = True
    ) -> datasets.Dataset:
        assert (source, seed) == ("miniature", 0)
        return SPLITS[split] if limit is None else SPLITS[split].select(range(limit))

    def open_split(source: str, split: str, seed: int) -> Split:
        assert (source, seed) == ("miniature", 0)
        return split_of(SPLITS[split], split)

    monkeypatch.setattr(inputs, "load_scienceqa", load_split)
    monkeypatch.setattr(inputs, "open_scienceqa", open_split)

    class Recording(Tracker):
        """Keeps what it is given instead of logging it."""

        def __init__(self, tracking: TrackingConfig, group: str, *_: Any) -> None:
            super().__init__(replace(tracking, mode="off"), group, "")
            self.given = (tracking, group)

        def finish(self, record: Record, problems: datasets.Dataset) -> None:
            calls.append((record, problems, *self.given))

    monkeypatch.setattr(pipeline, "Tracker", Recording)
    return calls


@pytest.fixture
def cell(checkpoint: Path, tmp_path: Path) -> Any:
    """Makes the configuration of a cell of the toy."""

    def make(*overrides: str) -> RunConfig:
        return load(
            "model.name=toy",
            f"model.path={checkpoint}",
            "model.weight_group_size=16",
            "model.vision_weight_group_size=16",
            f"results_dir={tmp_path}/results",
            "calibration.samples=6",
            "evaluation.max_new_tokens=4",
            "device=cpu",
            *overrides,
        )

    return make

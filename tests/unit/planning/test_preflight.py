"""Preflight says what cells would take, downloads nothing, and refuses what cannot fit."""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError

from qvlm.cell import checks, pipeline
from qvlm.cell.identity import Cell
from qvlm.cli import main
from qvlm.models.checkpoints import hub
from qvlm.planning import preflight as report
from qvlm.planning import sources
from qvlm.planning.estimates import find_shape, memory
from qvlm.planning.footprint import GIB
from qvlm.planning.timing import seconds
from qvlm.records.record import write_record
from qvlm.runtime import precision
from tests.helpers.configs import load
from tests.helpers.records import PREDICTIONS, RUN
from tests.helpers.standins import write

pytestmark = pytest.mark.slow

PAPER = ["-m", "experiment=table2", "scale=paper", "preflight=true"]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, an empty cache, a hub that does not answer, and nothing that may run."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_cached", lambda *_: None)
    monkeypatch.setattr(HfApi, "repo_info", answer(OSError("no network")))
    for module, name in ((hub, "snapshot_download"), (pipeline, "compute")):
        monkeypatch.setattr(module, name, None)
    return tmp_path


def answer(result: Any) -> Callable[..., Any]:
    """A hub that says the same to everyone."""

    def repo_info(*_: Any, **__: Any) -> Any:
        if isinstance(result, Exception):
            raise result
        files = [SimpleNamespace(rfilename=name, size=size) for name, size in result.items()]
        return SimpleNamespace(siblings=files)

    return repo_info


def machine(monkeypatch: pytest.MonkeyPatch, memory_gib: float, disk_gib: float = 1000) -> None:
    """A machine of this size, on which everything takes an hour."""
    monkeypatch.setattr(report, "_free", lambda device: memory_gib * GIB)
    monkeypatch.setattr(report, "disk_usage", lambda _: SimpleNamespace(free=disk_gib * GIB))
    monkeypatch.setattr(report, "seconds", lambda *_: 3600.0)


def row(page: str, *words: str) -> list[str]:
    """The cells of the row of a table that has all of these words."""
    (line,) = (line for line in page.splitlines() if all(f" {word} " in line for word in words))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_miniatures_are_here_and_nothing_is_run(
    alone: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["-m", "method=fp,rtn", "bits=w6a6,w4a4", "preflight=true"]) == 0
    page, err = capfd.readouterr()
    assert err == ""
    assert row(page, "model mini_llava")[3:] == ["0.0", "the disk"]
    assert row(page, "data miniature")[1] == "generated"
    assert row(page, "fp", "FP")[3] == "no"
    hours = float(row(page, "rtn", "W4A4")[5])
    assert hours > 0
    assert "To do: 3 cells" in page
    assert os.listdir() == []
    assert main(["preflight=true"]) == 0  # one cell, without -m
    assert "Preflight of 1 cells" in capfd.readouterr().out
    assert os.listdir() == []


def record(config: Any) -> None:
    cell = Cell.of(config)
    files: Any = {
        "metrics": {"classes": {"Avg": {}}},
        "predictions": PREDICTIONS,
        "layers": [],
    }
    write_record(cell.path, asdict(cell.config), RUN | cell.identity, **files)


def test_recorded_cells_are_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    machine(monkeypatch, 100)
    config = load("method=fp")
    record(config)
    line = ["-m", "method=fp,rtn", "preflight=true"]
    assert main(line) == 0
    page = capfd.readouterr().out
    assert [row(page, name)[3] for name in ("fp", "rtn")] == ["yes", "no"]
    assert "To do: 1 cells, about 1 hours" in page
    assert main([*line, "force=true"]) == 0
    assert "To do: 2 cells" in capfd.readouterr().out

    # A checkpoint that may be large is not hashed: then only the files are not compared.
    standin = write("llava", tmp_path)
    words = [f"model.path={standin.folder}", f"model.vision_tower={standin.tower}"]
    config = load("model=llava_13b", "method=fp", *words)
    record(config)
    monkeypatch.setattr(Cell, "of", None)
    assert main(["-m", "model=llava_13b", "method=fp,rtn", *words, "preflight=true"]) == 0
    page = capfd.readouterr().out
    assert [row(page, name)[3] for name in ("fp", "rtn")] == ["yes*", "no"]
    size = sum(file.stat().st_size for file in standin.folder.iterdir())
    source = sources.checkpoint(str(standin.folder), "", "", None)
    assert 0 < source.size <= size  # type: ignore[operator]
    assert source.download == 0


def test_the_papers_scale_is_estimated_where_the_hub_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    machine(monkeypatch, 500)
    assert main(PAPER) == 0
    page = capfd.readouterr().out
    for model, billions in (("llava_13b", 13.0), ("moe_llava", 2.9)):
        size, download, known = row(page, f"model {model}")[2:]
        assert float(size) == pytest.approx(2e9 * billions / GIB, rel=0.02)
        assert download == size
        assert known == "an estimate: the hub does not answer"
    assert row(page, "data scienceqa")[2:4] == ["?", "?"]
    assert "To do: 34 cells, about 34 hours" in page
    assert os.listdir() == []


def test_float32_is_advised_on_a_cpu_that_is_faster_in_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    machine(monkeypatch, 500)
    for ratio, times in ((7.9, 1), (1.0, 0)):
        monkeypatch.setattr(precision, "slowdown", lambda _, ratio=ratio: ratio)
        assert main(PAPER) == 0
        page = capfd.readouterr().out
        assert page.count("Give model.dtype=float32 instead of model.dtype=float16") == times


def test_a_model_that_the_paper_has_not_is_estimated_too() -> None:
    for model, billions in (("moe_llava_phi2", 5.6), ("moe_llava_qwen", 3.4), ("moe_llava", 3.2)):
        shape = find_shape(load(f"model={model}").model)
        assert shape is not None
        assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.02)
    assert (
        find_shape(load("model.name=mine", "model.path=a/b", "model.stands_for=null").model) is None
    )


@pytest.mark.parametrize(
    ("free", "options", "words"),
    [
        (40, ["model=llava_13b", "method=fp"], ["llava_13b fp FP", "evaluation.batch_size=4"]),
        (
            *(20, ["model=llava_13b", "method=rtn", "evaluation.batch_size=1"]),
            ["stream=true save_packed=FOLDER would fit"],
        ),
        (
            *(20, ["model=llava_13b", "method=qvlm", "evaluation.batch_size=1"]),
            ["model.packed=FOLDER"],
        ),
        (9, ["model=llava_7b", "method=fp"], ["llava_7b fp FP", "no option"]),
        (20, ["model=llava_7b", "model.dtype=float32", "method=fp"], ["model.dtype=bfloat16"]),
        (1, [], ["34 cells do not fit"]),
    ],
)
def test_a_cell_that_does_not_fit_is_refused_with_the_option_that_helps(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    free: float,
    options: list[str],
    words: list[str],
) -> None:
    machine(monkeypatch, free)
    bits = ["bits=w4a4"] if options else []
    assert main([*PAPER, *options, *bits]) == 2
    page, err = capfd.readouterr()
    assert "| llava_" in page
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    ("options", "cards", "helps"),
    [
        (["method=fp"], 2, "device=map"),
        (["method=fp"], 1, "device=map"),  # the rest in main memory
        (["method=rtn", "bits=w4a4"], 3, "device=map"),
        (["method=rtn", "bits=w4a4"], 2, "stream=true save_packed=FOLDER"),
        (["method=rtn", "bits=w4a4", "device=map"], 3, ""),
        (["method=rtn", "bits=w4a4", "device=map"], 2, "model.packed=FOLDER"),
    ],
)
def test_what_is_too_large_for_one_card_may_fit_on_several(
    options: list[str],
    cards: int,
    helps: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    machine(monkeypatch, 0)
    room = {"cpu": 48 * GIB} | {f"cuda:{card}": 24 * GIB for card in range(cards)}
    monkeypatch.setattr(report, "_free", lambda d: room.get(d, cards * 24 * GIB))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(checks, "memory_limits", lambda _: {})
    line = ["scale=paper", "model=llava_13b", "evaluation.batch_size=1", "preflight=true"]
    assert main([*line, *options]) == (2 if helps else 0)
    assert helps in capfd.readouterr().err


def test_downloads_need_a_disk(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    machine(monkeypatch, 500, disk_gib=20)
    assert main(PAPER) == 2
    assert "HF_HOME" in capfd.readouterr().err


def test_the_hubs_list_of_files_is_believed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    machine(monkeypatch, 500)
    files = {
        "config.json": GIB,
        "pytorch_model.bin.index.json": GIB,
        "pytorch_model-00001-of-00002.bin": 10 * GIB,
        "pytorch_model-00002-of-00002.bin": 9 * GIB,
        "optimizer.bin": 40 * GIB,
        "data/test-00000-of-00001.parquet": 3 * GIB,
    }
    monkeypatch.setattr(HfApi, "repo_info", answer(files))
    here = "pytorch_model-00001-of-00002.bin"
    monkeypatch.setattr(sources, "_cached", lambda place, name, kind: name == here or None)
    monkeypatch.setattr(sources, "local_copy", lambda place: None)
    assert main([*PAPER, "model=llava_13b", "method=fp"]) == 0
    page = capfd.readouterr().out
    assert row(page, "model llava_13b")[2:] == ["21.0", "11.0", "the hub"]
    assert row(page, "data scienceqa")[2:] == ["3.0", "3.0", "the hub"]


def test_what_is_nowhere_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    machine(monkeypatch, 500)
    missing = RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
    monkeypatch.setattr(HfApi, "repo_info", answer(missing))
    assert main([*PAPER, "model=llava_13b"]) == 2
    assert "model.path: the hub has no liuhaotian/" in capfd.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main([*PAPER, "model=llava_13b"]) == 2
    err = capfd.readouterr().err
    assert "HF_HUB_OFFLINE" in err
    assert "model.path=FOLDER" in err
    assert main(["model.path=nowhere", "preflight=true"]) == 2
    assert "model.path: nowhere is not a folder" in capfd.readouterr().err
    assert main(["method.foo=1", "preflight=true"]) == 2
    assert capfd.readouterr().out == ""


def test_estimates_follow_what_they_are_of() -> None:
    config = load("scale=paper")
    shape = find_shape(config.model)
    assert shape is not None
    assert shape.tower == "openai/clip-vit-large-patch14"
    weights = shape.quantized(True) * 4
    assert memory(config, shape) > weights  # simulated in float32
    assert shape.quantized(False) < shape.quantized(True) < shape.parameters
    stream = ["stream=true", "save_packed=FOLDER"]
    written = memory(load("scale=paper", *stream, "evaluate=false"), shape)
    assert written < memory(load("scale=paper", *stream), shape) < memory(config, shape) / 2
    smaller = load("scale=paper", "evaluation.batch_size=1", "method=fp")
    assert memory(smaller, shape) < memory(load("scale=paper", "method=fp"), shape)

    config = load("method=fp")
    shape = find_shape(config.model)
    assert shape is not None
    assert shape.tower is None
    once = seconds(config, shape, "cpu", 10)
    assert seconds(config, shape, "cpu", 20) == pytest.approx(2 * once)

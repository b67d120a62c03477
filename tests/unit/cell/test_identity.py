"""What identifies a cell, and where its record is."""

import shutil
from dataclasses import FrozenInstanceError, asdict
from pathlib import Path
from typing import Any

import pytest

from qvlm.cell.identity import Cell, resolve
from qvlm.errors import UserError
from qvlm.records import provenance
from tests.helpers.configs import load
from tests.helpers.origins import make_origin, write_json

pytestmark = pytest.mark.slow

NOWHERE = "results_dir=nowhere"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of our source that a test may edit."""
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(provenance.PACKAGE, tmp_path / "qvlm", ignore=ignored)
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "qvlm")
    return tmp_path / "qvlm"


def test_a_cell_is_a_value() -> None:
    cell = Cell.of(load(NOWHERE))
    assert cell == Cell.of(load(NOWHERE))
    assert cell.path == Path(f"nowhere/runs/mini_llava-rtn-w4a4-{cell.hash[:8]}")
    assert cell.result == cell.path
    assert set(cell.identity) == {"hash", "influences", "code", "files_hashed"}
    with pytest.raises(FrozenInstanceError):
        cell.hash = ""  # type: ignore[misc]


def test_the_hash_is_of_what_changes_a_number() -> None:
    cell = Cell.of(load())
    for same in ("results_dir=elsewhere", "threads=1", "evaluate=false save_packed=x"):
        other = Cell.of(load("execution=packed", *same.split()))
        assert other.hash == Cell.of(load("execution=packed")).hash != cell.hash
    assert cell.on("cuda:1").hash == cell.hash
    assert cell.on("cuda:1").config.device == "cuda:1"


def test_a_changed_line_of_native_c_makes_packed_cells_others(package: Path) -> None:
    before = Cell.of(load("execution=packed"))
    (source,) = package.rglob("native.c")
    source.write_text(source.read_text().replace(";", ";;", 1))
    after = Cell.of(load("execution=packed"))
    assert after.code != before.code
    assert after.path != before.path


def test_full_precision_is_one_cell_however_it_is_asked_for() -> None:
    cells = [
        Cell.of(load(*words.split())) for words in ("method=fp", "bits=fp", "method=fp seed=0")
    ]
    assert len({cell.hash for cell in cells}) == 1
    assert cells[0].path.name.startswith("mini_llava-fp-fp-")


def test_files_that_a_cell_reads_are_part_of_it(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "test.parquet").write_bytes(b"one")
    words = ("data=folder", f"data.source={data}")
    before = Cell.of(load(*words))
    assert set(before.files_hashed) == {"model", "data"}
    (data / "test.parquet").write_bytes(b"another")
    assert Cell.of(load(*words)).hash != before.hash


@pytest.mark.parametrize("content", ["{}", '{"config": {"method": 1}}', '{"config": null}'])
def test_a_packed_checkpoint_must_say_how_it_was_made(content: str, tmp_path: Path) -> None:
    (tmp_path / "qvlm.json").write_text(content)
    with pytest.raises(UserError, match=r"qvlm\.json that cannot be used: it is not of version"):
        resolve(load(f"model.packed={tmp_path}"))


def test_a_packed_model_is_not_packed_again(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Give save_packed=null"):
        resolve(load(f"model.packed={tmp_path}", f"save_packed={tmp_path}"))


def test_a_folder_with_other_files_is_no_place_to_save(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    folder.mkdir()
    config: Any = load(f"save_packed={folder}", f"results_dir={tmp_path}/results")
    cell = Cell.of(config)
    assert not cell.is_saved()
    (folder / "diary.txt").write_text("dear")
    with pytest.raises(UserError, match="new or an empty folder"):
        cell.is_saved()


@pytest.mark.parametrize("place", ["orig", "link", "orig/below", ".", "orig/../orig", "./orig"])
@pytest.mark.parametrize("option", ["model.path", "data.source"])
def test_a_model_is_not_saved_into_what_it_is_made_of(
    place: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the folder is a packed checkpoint, which another save could replace."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "orig").mkdir()
    write_json(tmp_path / "orig", asdict(make_origin()))
    (tmp_path / "link").symlink_to("orig")
    words = [f"save_packed={place}", f"{option}=orig", "results_dir=/tmp/elsewhere"]
    words += ["data=folder"] if option == "data.source" else []
    with pytest.raises(UserError, match=f"^save_packed=.* is not a folder apart from {option}"):
        Cell.of(load(*words))
    assert [str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()] == [
        "orig/qvlm.json"
    ]


@pytest.mark.parametrize("place", ["results", "results/runs", "results/runs/packed"])
def test_a_model_is_not_saved_among_records(place: str, tmp_path: Path) -> None:
    words = [f"save_packed={tmp_path}/{place}", f"results_dir={tmp_path}/results"]
    with pytest.raises(UserError, match="is not a folder apart from results_dir"):
        Cell.of(load(*words))
    Cell.of(load(f"save_packed={tmp_path}/results/packed", words[1]))

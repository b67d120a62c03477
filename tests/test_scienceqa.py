"""The schema, the sources, and every way in which a data set can be wrong."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from qvlm.data import miniature
from qvlm.data.preview import contact_sheet
from qvlm.data.scienceqa import FEATURES, load_scienceqa, validate
from qvlm.errors import UserError


def folder_with(path: Path, problems: list[dict[str, Any]], features: datasets.Features) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(problems, features=features).to_parquet(path / "test.parquet")
    return path


@pytest.fixture(scope="module")
def problems() -> list[dict[str, Any]]:
    return miniature.generate("test", 60)


def test_parquet_round_trip_keeps_everything(
    tmp_path: Path, problems: list[dict[str, Any]]
) -> None:
    data = load_scienceqa(str(folder_with(tmp_path, problems, FEATURES)), "test")
    assert data.features == FEATURES
    assert len(data) == len(problems)
    for row, problem in zip(data, problems, strict=True):
        for column in set(FEATURES) - {"image"}:
            assert row[column] == problem[column]
        assert (row["image"] is None) == (problem["image"] is None)
        if problem["image"] is not None:
            assert row["image"].convert("RGB").tobytes() == problem["image"].tobytes()


def test_split_without_any_image_keeps_its_column(
    tmp_path: Path, problems: list[dict[str, Any]]
) -> None:
    plain = [problem for problem in problems if problem["image"] is None]
    data = load_scienceqa(str(folder_with(tmp_path, plain, FEATURES)), "test")
    assert data.features["image"] == datasets.Image()
    assert data[0]["image"] is None


def test_hub_layout_is_found(tmp_path: Path, problems: list[dict[str, Any]]) -> None:
    folder_with(tmp_path / "data", problems, FEATURES)
    (tmp_path / "data/test.parquet").rename(tmp_path / "data/test-00000-of-00001-ab.parquet")
    assert len(load_scienceqa(str(tmp_path), "test")) == len(problems)


def test_generated_split_is_the_generators(problems: list[dict[str, Any]]) -> None:
    data = load_scienceqa("miniature", "test", 5)
    assert data["question"][:] == [p["question"] for p in miniature.generate("test", 4000)[:5]]


@pytest.mark.parametrize("column", ["image", "hint", "lecture"])
def test_missing_column_is_named(
    tmp_path: Path, problems: list[dict[str, Any]], column: str
) -> None:
    features = datasets.Features({k: v for k, v in FEATURES.items() if k != column})
    rows = [{k: v for k, v in problem.items() if k != column} for problem in problems]
    with pytest.raises(UserError, match=f"column '{column}' is missing; needed are image, "):
        load_scienceqa(str(folder_with(tmp_path, rows, features)), "test")


def test_picture_that_does_not_decode_is_named(
    tmp_path: Path, problems: list[dict[str, Any]]
) -> None:
    broken = [dict(problem) for problem in problems[:3]]
    broken[1]["image"] = {"bytes": b"this is no picture", "path": None}
    with pytest.raises(UserError, match="the image of row 1 does not decode"):
        load_scienceqa(str(folder_with(tmp_path, broken, FEATURES)), "test")


def test_answer_beyond_the_choices_is_named(problems: list[dict[str, Any]]) -> None:
    rows = [dict(problems[0]), {**problems[1], "answer": 9}]
    with pytest.raises(UserError, match="row 1 has answer 9"):
        validate(datasets.Dataset.from_list(rows, features=FEATURES), "toy")


def test_truncated_file_is_one_sentence(tmp_path: Path, problems: list[dict[str, Any]]) -> None:
    file = folder_with(tmp_path, problems, FEATURES) / "test.parquet"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match="cannot be read"):
        load_scienceqa(str(tmp_path), "test")


@pytest.mark.parametrize(
    ("source", "split", "limit", "message"),
    [
        ("/nonexistent", "test", None, "is not a folder; accepted are miniature or a folder"),
        ("{tmp}", "test", None, "has no test.parquet"),
        ("miniature", "dev", None, "accepted are train, validation, test"),
        ("miniature", "validation", -1, "limit: -1 is not accepted"),
        ("miniature", "validation", 2001, "has 2000 problems"),
    ],
)
def test_bad_requests(
    tmp_path: Path, source: str, split: str, limit: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_scienceqa(source.format(tmp=tmp_path), split, limit)


def test_contact_sheet_has_a_row_per_skill() -> None:
    sheet = contact_sheet("train", 1)
    assert sheet.height % len(miniature.SKILLS) == 0
    assert len(set(sheet.get_flattened_data())) > 500

"""Splits of ScienceQA from every source: the same problems, ids and sentences."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets.exceptions import DatasetNotFoundError
from PIL import Image

from qvlm.cell import inputs as prepare
from qvlm.data import miniature, validation
from qvlm.data.miniature.preview import contact_sheet
from qvlm.data.scienceqa import (
    COLUMNS,
    FEATURES,
    load_scienceqa,
    open_scienceqa,
    require_published,
)
from qvlm.errors import UserError
from tests.helpers.configs import load as compose

pytestmark = pytest.mark.slow


def folder_with(path: Path, problems: list[dict[str, Any]], features: datasets.Features) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(problems, features=features).to_parquet(path / "test.parquet")
    return path


def official_layout(path: Path, problems: list[dict[str, Any]]) -> Path:
    """Writes problems as the authors of ScienceQA publish them, ids not in the order of the split.

    The layout: one JSON of all problems by id, one of the ids of each split, and a picture's file
    under the split and the id; splits are called train, val, test, minitrain, ...
    """
    known, order = {}, []
    for number, problem in enumerate(problems):
        identifier = str(7 * number % 1009)
        order.append(identifier)
        picture = problem["image"]
        if picture is not None:
            folder = path / "images" / "test" / identifier
            folder.mkdir(parents=True)
            picture.save(folder / "image.png")
        known[identifier] = {
            **problem,
            "image": None if picture is None else "image.png",
            "split": "test",
        }
    path.mkdir(parents=True, exist_ok=True)
    by_number = dict(sorted(known.items(), key=lambda item: int(item[0])))
    (path / "problems.json").write_text(json.dumps(by_number))
    splits = {"train": [], "val": [], "test": order, "minitest": order[:3]}
    (path / "pid_splits.json").write_text(json.dumps(splits))
    return path


def same_problems(left: datasets.Dataset, right: datasets.Dataset) -> bool:
    """Whether two data sets hold equal problems and ids, images to the pixel, in equal order."""
    if left.features != right.features or len(left) != len(right):
        return False
    for one, other in zip(left, right, strict=True):
        pictures = [row.pop("image") for row in (one, other)]
        for row in (one, other):
            row.pop("official_id")
        pixels = [picture and picture.convert("RGB").tobytes() for picture in pictures]
        if one != other or pixels[0] != pixels[1]:
            return False
    return True


@pytest.fixture(scope="module")
def problems() -> list[dict[str, Any]]:
    return miniature.generate("test", 60)


def test_parquet_round_trip_keeps_everything(
    tmp_path: Path, problems: list[dict[str, Any]]
) -> None:
    data = load_scienceqa(str(folder_with(tmp_path, problems, COLUMNS)), "test")
    assert data.features == FEATURES
    assert len(data) == len(problems)
    for row, problem in zip(data, problems, strict=True):
        for column in set(COLUMNS) - {"image"}:
            assert row[column] == problem[column]
        assert (row["image"] is None) == (problem["image"] is None)
        if problem["image"] is not None:
            assert row["image"].convert("RGB").tobytes() == problem["image"].tobytes()


def test_a_replaced_file_of_the_same_time_is_read_anew(
    tmp_path: Path, problems: list[dict[str, Any]]
) -> None:
    for part in (problems[:3], problems[3:7]):
        file = folder_with(tmp_path, part, COLUMNS) / "test.parquet"
        os.utime(file, (0, 0))
        asked = load_scienceqa(str(tmp_path), "test")["question"][:]
        assert asked == [problem["question"] for problem in part]


def test_a_subject_or_grade_of_no_class_is_said(
    tmp_path: Path, problems: list[dict[str, Any]]
) -> None:
    """Such problems are in no row but that of the average."""
    rows = [{**problem, "subject": "", "grade": ""} for problem in problems[:4]]
    with warnings.catch_warnings(action="error"):
        load_scienceqa(str(folder_with(tmp_path, rows, COLUMNS)), "test")
    rows[1]["grade"], rows[2]["subject"], rows[3]["subject"] = "Grade 3", "biology", "history"
    with pytest.warns(UserWarning, match="has no class") as said:
        load_scienceqa(str(folder_with(tmp_path, rows, COLUMNS)), "test")
    words = [str(each.message) for each in said]
    assert "row 2, column 'subject': 'biology' has no class. 2 of 4 problems" in words[0]
    assert "row 1, column 'grade': 'Grade 3' has no class. 1 of 4 problems" in words[1]


def test_split_without_any_image_keeps_its_column(
    tmp_path: Path, problems: list[dict[str, Any]]
) -> None:
    plain = [problem for problem in problems if problem["image"] is None]
    data = load_scienceqa(str(folder_with(tmp_path, plain, COLUMNS)), "test")
    assert data.features["image"] == datasets.Image()
    assert data[0]["image"] is None


def test_hub_layout_is_found(tmp_path: Path, problems: list[dict[str, Any]]) -> None:
    folder_with(tmp_path / "data", problems, COLUMNS)
    (tmp_path / "data/test.parquet").rename(tmp_path / "data/test-00000-of-00001-ab.parquet")
    assert len(load_scienceqa(str(tmp_path), "test")) == len(problems)


def test_generated_split_is_the_generators(problems: list[dict[str, Any]]) -> None:
    data = load_scienceqa("miniature", "test", 5)
    assert data["question"][:] == [p["question"] for p in miniature.generate("test", 4000)[:5]]


@pytest.mark.parametrize("column", ["image", "hint", "lecture"])
def test_missing_column_is_named(
    tmp_path: Path, problems: list[dict[str, Any]], column: str
) -> None:
    features = datasets.Features({k: v for k, v in COLUMNS.items() if k != column})
    rows = [{k: v for k, v in problem.items() if k != column} for problem in problems]
    with pytest.raises(
        UserError, match=f"column '{column}' is missing. A problem has the columns image, "
    ):
        load_scienceqa(str(folder_with(tmp_path, rows, features)), "test")


def test_picture_that_does_not_decode_is_named(
    tmp_path: Path, problems: list[dict[str, Any]]
) -> None:
    broken = [dict(problem) for problem in problems[:3]]
    broken[1]["image"] = {"bytes": b"this is no picture", "path": None}
    with pytest.raises(UserError, match="test.parquet, row 1, column 'image': it does not decode"):
        load_scienceqa(str(folder_with(tmp_path, broken, COLUMNS)), "test")


def test_truncated_file_is_one_sentence(tmp_path: Path, problems: list[dict[str, Any]]) -> None:
    file = folder_with(tmp_path, problems, COLUMNS) / "test.parquet"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match="cannot be read"):
        load_scienceqa(str(tmp_path), "test")


@pytest.mark.parametrize("limit", [None, 3])
def test_a_split_without_problems_is_refused(
    limit: int | None, tmp_path: Path, problems: list[dict[str, Any]]
) -> None:
    rows = datasets.Dataset.from_list(problems)
    rows.select([]).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(UserError, match="split test of .* holds no problems. Give data with at"):
        load_scienceqa(str(tmp_path), "test", limit)


@pytest.mark.parametrize(
    ("source", "split", "limit", "message"),
    [
        ("/nonexistent", "test", None, "is not a folder. Give miniature, a folder with"),
        ("{tmp}", "test", None, "has no test.parquet"),
        ("miniature", "dev", None, "Choose one of: train, validation, test"),
        ("miniature", "validation", -1, "limit: -1 is not a number of problems"),
        ("miniature", "validation", 2001, "Give 1 to 2000"),
    ],
)
def test_bad_requests(
    tmp_path: Path, source: str, split: str, limit: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_scienceqa(source.format(tmp=tmp_path), split, limit)


def test_hub_folder_and_official_layout_give_the_same_problems(
    tmp_path: Path, problems: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = folder_with(tmp_path / "parquet", problems, COLUMNS)
    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        rows = datasets.Dataset.from_parquet(str(parquet / f"{split}.parquet"))
        return rows.add_column("more", list(range(len(rows))))  # a column that we do not know

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    folder = load_scienceqa(str(parquet), "test")
    official = load_scienceqa(str(official_layout(tmp_path / "official", problems)), "test")
    hub = load_scienceqa("derek-thomas/ScienceQA", "test")
    assert asked == [("derek-thomas/ScienceQA", "test")]
    assert same_problems(folder, official)
    assert same_problems(folder, hub)
    assert folder["question"][:] == [problem["question"] for problem in problems]
    ids = [f"test-{row}" for row in range(len(problems))]
    assert folder["question_id"][:] == hub["question_id"][:] == official["question_id"][:] == ids
    assert official["official_id"][:3] == ["0", "7", "14"]
    assert set(folder["official_id"]) == set(hub["official_id"]) == {None}
    changed = [*problems[:-1], {**problems[-1], "hint": "another"}]
    other = load_scienceqa(str(official_layout(tmp_path / "other", changed)), "test")
    assert not same_problems(folder, other)


def break_json(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return break_it


def test_a_saved_data_set_gives_the_same_problems(
    tmp_path: Path, problems: list[dict[str, Any]]
) -> None:
    rows = datasets.Dataset.from_list(problems, features=COLUMNS)
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "saved")
    saved = load_scienceqa(str(tmp_path / "saved"), "test")
    folder = load_scienceqa(str(folder_with(tmp_path / "parquet", problems, COLUMNS)), "test")
    assert same_problems(saved, folder)
    next((tmp_path / "saved/test").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        load_scienceqa(str(tmp_path / "saved"), "test")


def test_a_saved_data_set_names_no_file_elsewhere(
    tmp_path: Path, problems: list[dict[str, Any]]
) -> None:
    rows = datasets.Dataset.from_list(problems, features=COLUMNS)
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "saved")
    state = tmp_path / "saved/test/state.json"
    content = json.loads(state.read_text())
    content["_data_files"][0]["filename"] = "../../other.arrow"
    state.write_text(json.dumps(content))
    with pytest.raises(UserError, match="other.arrow', which is not in the folder"):
        load_scienceqa(str(tmp_path / "saved"), "test")


def test_rows_keep_their_ids_under_a_limit(tmp_path: Path, problems: list[dict[str, Any]]) -> None:
    source = str(folder_with(tmp_path, problems, COLUMNS))
    assert load_scienceqa(source, "test", 3)["question_id"][:] == ["test-0", "test-1", "test-2"]
    assert list(open_scienceqa(source, "test").take([4, 9])["question_id"]) == ["test-4", "test-9"]


def test_rows_beyond_the_limit_are_not_looked_at(
    tmp_path: Path, problems: list[dict[str, Any]]
) -> None:
    rows = [*problems[:5], {**problems[5], "question": None}]
    source = str(folder_with(tmp_path, rows, COLUMNS))
    assert len(load_scienceqa(source, "test", 5)) == 5
    with pytest.raises(UserError, match="test.parquet, row 5, column 'question'"):
        load_scienceqa(source, "test")


def test_a_process_checks_the_same_rows_once(
    tmp_path: Path, problems: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(folder_with(tmp_path, problems, COLUMNS))
    decoded: list[bytes] = []
    true = validation.decode
    monkeypatch.setattr(
        validation, "decode", lambda content: (decoded.append(content), true(content))[1]
    )
    first = load_scienceqa(source, "test", 20)
    once = len(decoded)
    assert once == sum(problem["image"] is not None for problem in problems[:20])
    assert load_scienceqa(source, "test", 20) is first
    assert len(decoded) == once
    folder_with(tmp_path, problems[:30], COLUMNS)  # other files are read anew
    with pytest.raises(UserError, match="Give 1 to 30"):
        load_scienceqa(source, "test", 31)


@pytest.mark.parametrize("name", ["test-00000-of-00002.parquet", "test-00001-of-00002-ab.parquet"])
def test_a_shard_that_is_missing_by_its_own_name(
    tmp_path: Path, problems: list[dict[str, Any]], name: str
) -> None:
    folder_with(tmp_path, problems, COLUMNS)
    (tmp_path / "test.parquet").rename(tmp_path / name)
    other = "00001" if "00000" in name else "00000"
    with pytest.raises(UserError, match=f"test-{other}-of-00002.parquet is missing"):
        load_scienceqa(str(tmp_path), "test")


def test_shards_are_read_in_order_and_rows_are_counted_in_their_file(
    tmp_path: Path, problems: list[dict[str, Any]]
) -> None:
    rows = [*problems[:20], {**problems[20], "choices": []}, *problems[21:]]
    for shard, part in enumerate((rows[:15], rows[15:])):
        folder_with(tmp_path, part, COLUMNS)
        (tmp_path / "test.parquet").rename(tmp_path / f"test-0000{shard}-of-00002.parquet")
    asked = load_scienceqa(str(tmp_path), "test", 20)["question"][:]
    assert asked == [problem["question"] for problem in problems[:20]]
    with pytest.raises(UserError, match="test-00001-of-00002.parquet, row 5, column 'choices'"):
        load_scienceqa(str(tmp_path), "test")


@pytest.mark.parametrize("rows", [slice(None), slice(10, 20)])
def test_two_files_that_hold_the_same_rows(
    tmp_path: Path, problems: list[dict[str, Any]], rows: slice
) -> None:
    folder_with(tmp_path / "data", problems[rows], COLUMNS)
    folder_with(tmp_path, problems, COLUMNS)
    with pytest.raises(UserError, match="hold the same rows"):
        load_scienceqa(str(tmp_path), "test")


@pytest.mark.parametrize("image", ["../../../outside.png", "/etc/hostname", "{tmp}/outside.png"])
def test_image_paths_stay_inside_the_folder(
    tmp_path: Path, problems: list[dict[str, Any]], image: str
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    folder = official_layout(tmp_path / "official", problems)
    named = f"{'../' * 3}{image}" if image.startswith("..") else image.format(tmp=tmp_path)
    break_json("problems.json", lambda p: p["7"].update(image=named))(folder)
    with pytest.raises(UserError, match="problem 7, column 'image': .* (lies outside|is missing)"):
        load_scienceqa(str(folder), "test")
    data = tmp_path / "parquet"
    rows = [{**problems[0], "image": {"path": str(tmp_path / "outside.png"), "bytes": None}}]
    data.mkdir()
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, data / "test.parquet")
    with pytest.raises(UserError, match="row 0, column 'image': .* lies outside"):
        load_scienceqa(str(data), "test")


def first_picture(folder: Path) -> Path:
    return min(folder.rglob("image.png"))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (break_json("problems.json", lambda p: p.pop("7")), "problems.json lacks problem 7"),
        (
            break_json("problems.json", lambda p: p["7"].pop("hint")),
            "7: column 'hint' is missing",
        ),
        (
            break_json("problems.json", lambda p: p["7"].update(answer="B")),
            ".*'B' is not an",
        ),
        (
            break_json("problems.json", lambda p: p["7"].update(answer=9)),
            "column 'answer': 9 is",
        ),
        (
            break_json("pid_splits.json", lambda p: p.pop("test")),
            "no split test, only train",
        ),
        (lambda folder: first_picture(folder).unlink(), "image.png is missing"),
        (lambda folder: first_picture(folder).write_bytes(b"x"), "problem .* it does not decode"),
        (lambda folder: (folder / "problems.json").write_text("{"), "problems.json cannot be read"),
        (lambda folder: (folder / "pid_splits.json").write_text("[]"), "is not a JSON object"),
    ],
)
def test_official_layout_that_is_broken(
    tmp_path: Path,
    problems: list[dict[str, Any]],
    break_it: Callable[[Path], None],
    message: str,
) -> None:
    folder = official_layout(tmp_path / "official", problems)
    break_it(folder)
    with pytest.raises(UserError, match=message) as refusal:
        load_scienceqa(str(folder), "test")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DatasetNotFoundError("no"), "not on the hub, or gated"),
        (ConnectionError("no route"), r"cannot be downloaded \(no route\). .* data.source=FOLDER"),
    ],
)
def test_hub_that_fails_has_a_remedy(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=message):
        load_scienceqa("derek-thomas/ScienceQA", "test")


def published_split() -> datasets.Dataset:
    """4,241 questions in the classes of the real test split, 2,017 of them with a picture."""
    picture = {"path": None, "bytes": b"never decoded"}
    subjects = ["natural science"] * 2252 + ["social science"] * 889 + ["language science"] * 1100
    blank = dict.fromkeys(COLUMNS, "") | {"choices": ["a", "b"], "answer": 0}
    rows = [
        {**blank, "subject": subject, "image": picture if row < 2017 else None}
        for row, subject in enumerate(subjects)
    ]
    return datasets.Dataset.from_list(rows, features=COLUMNS)


def test_published_classes_have_their_sizes() -> None:
    whole = published_split()
    require_published(whole, "real")
    for data, found in (
        (whole.select(range(4240)), "has 4240 questions .* published ScienceQA has 4241"),
        (whole.select([*range(4240), 0]), "has 2253 NAT .* has 2252"),
        (whole.select([*range(4240), 4239]).select([0, *range(2, 4241), 2100]), "has 2016 IMG"),
    ):
        with pytest.raises(UserError, match=found):
            require_published(data, "real")


@pytest.mark.parametrize(
    ("options", "checked"),
    [
        (["data=scienceqa"], True),
        (["data=scienceqa", "evaluation.limit=5"], False),
        (["data=scienceqa", "data.split=validation"], False),
        (["data=scienceqa", "data.published=false"], False),
        (["data=official", "data.source=somewhere"], True),
        (["data=folder", "data.source=somewhere"], False),
    ],
)
def test_class_sizes_are_checked_where_the_whole_published_split_is_used(
    monkeypatch: pytest.MonkeyPatch,
    problems: list[dict[str, Any]],
    options: list[str],
    checked: bool,
) -> None:
    data = datasets.Dataset.from_list(problems, features=COLUMNS)
    monkeypatch.setattr(prepare, "load_scienceqa", lambda *_: data)
    config = compose(*options)
    if checked:
        with pytest.raises(UserError, match="has 60 questions"):
            prepare.load_problems(config)
    else:
        assert len(prepare.load_problems(config)) == 60


def test_contact_sheet_has_a_row_per_skill() -> None:
    sheet = contact_sheet("train", 1)
    assert sheet.height % len(miniature.SKILLS) == 0
    assert len(set(sheet.get_flattened_data())) > 500

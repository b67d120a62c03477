"""The tasks of Table 3: how an answer is scored, and that they run on data of a user."""

import io
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from PIL import Image

from qvlm.errors import UserError
from qvlm.evaluation.tasks import evaluate_tasks, load_tasks
from qvlm.evaluation.vqa.questions import documents, normalize, require_data, score
from tests.helpers.configs import load
from tests.helpers.problems import make_model


@pytest.mark.parametrize(
    ("written", "compared"),
    [
        ("The Dog.", "dog"),
        ("two dogs, a cat", "2 dogs cat"),
        ("It's 1,000!", "its 1000"),
        ("isnt", "isnt"),
        ("isn't", "isnt"),
        ("3.5", "3.5"),
        ("dark-blue", "dark blue"),
    ],
)
def test_answers_are_compared_in_one_form(written: str, compared: str) -> None:
    assert normalize(written) == compared


@pytest.mark.parametrize("agreeing", range(11))
def test_the_score_is_the_mean_over_nine_of_ten(agreeing: int) -> None:
    answers = ["red"] * agreeing + ["blue"] * (10 - agreeing)
    drawn = itertools.combinations(answers, 9)
    expected = sum(min(1, nine.count("red") / 3) for nine in drawn) / 10
    assert score({"answers": answers}, ["Red."])["accuracy"] == pytest.approx(expected)
    as_mappings = [{"answer": answer} for answer in answers]
    assert score({"answers": as_mappings}, ["red"])["accuracy"] == pytest.approx(expected)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four questions of each task."""
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = io.BytesIO()
    Image.new("RGB", (9, 12), "red").save(file, "PNG")
    for name in ("vqav2", "vizwiz"):
        (tmp_path / "data" / name).mkdir(parents=True)
        rows = {
            "image": [{"bytes": file.getvalue(), "path": None}] * 4,
            "question": ["g h", "i", "j k", "l"],
            "answers": [["A"] * 10, ["B"] * 10, ["C"] * 10, ["a b"] * 10],
            "category": ["other"] * 4,
        }
        pd.DataFrame(rows).to_parquet(tmp_path / "data" / name / "val-0.parquet")
    return tmp_path / "data"


def test_both_run_where_the_data_are(folder: Path) -> None:
    tasks = load_tasks(["vqav2", "vizwiz"], metadata={"folder": str(folder)})
    evaluation = evaluate_tasks(make_model(), tasks, 3, chat_template=True)
    results = evaluation.metrics["tasks"]["results"]
    assert {name: set(results[name]) >= {"accuracy,none"} for name in results} == {
        "vqav2": True,
        "vizwiz": True,
    }
    ((asked,),) = json.loads(evaluation.predictions["requests"][4])
    assert "USER: <image>\ng h\nWhen the provided information is insufficient" in asked
    assert asked.endswith("using a single word or phrase. ASSISTANT:")


def test_missing_data_are_told_in_one_sentence(folder: Path) -> None:
    require_data(["vqav2", "arc_easy"], str(folder))
    with pytest.raises(UserError, match="task=vqav2 needs the validation questions of VQAv2"):
        require_data(["vqav2"], None)
    (folder / "vizwiz" / "val-0.parquet").unlink()
    with pytest.raises(UserError, match=f"parquet files in {folder}/vizwiz"):
        require_data(["vizwiz"], str(folder))
    (folder / "vqav2" / "val-0.parquet").unlink()
    pd.DataFrame({"question": ["g"]}).to_parquet(folder / "vqav2" / "val-0.parquet")
    with pytest.raises(UserError, match="has no column image"):
        load_tasks(["vqav2"], metadata={"folder": str(folder)})


def change(file: Path, **columns: list[Any]) -> None:
    """Replaces columns of a file and keeps its time."""
    state = file.stat()
    pd.read_parquet(file).assign(**columns).to_parquet(file)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_a_replaced_file_of_the_same_time_is_read_anew(folder: Path) -> None:
    documents(str(folder), "vqav2")
    change(folder / "vqav2" / "val-0.parquet", question=["new", "o", "p", "q and more"])
    assert documents(str(folder), "vqav2")["test"]["question"][0] == "new"


@pytest.mark.parametrize(
    "name",
    [
        "train-00000-of-00001.parquet",
        "test/0000.parquet",
        "testdev-0.parquet",
        "data/unnamed.parquet",
    ],
)
def test_only_the_validation_split_counts(folder: Path, name: str) -> None:
    validation = folder / "vqav2" / "val-0.parquet"
    other = folder / "vqav2" / name
    other.parent.mkdir(exist_ok=True)
    shutil.copy(validation, other)
    change(other, question=["other"] * 4)
    assert documents(str(folder), "vqav2")["test"]["question"][:] == ["g h", "i", "j k", "l"]


def test_files_of_other_splits_alone_are_refused(folder: Path) -> None:
    validation = folder / "vqav2" / "val-0.parquet"
    shutil.copy(validation, validation.with_name("test-0.parquet"))
    validation.rename(validation.with_name("train-0.parquet"))
    with pytest.raises(UserError, match="no file of the validation split, but test-0.parquet"):
        require_data(["vqav2"], str(folder))


def test_files_without_a_split_in_their_names_all_count(folder: Path) -> None:
    validation = folder / "vqav2" / "val-0.parquet"
    shutil.copy(validation, validation.with_name("a.parquet"))
    validation.rename(validation.with_name("b.parquet"))
    assert len(documents(str(folder), "vqav2")["test"]) == 8


@pytest.mark.parametrize("missing", [None, [], [None], ["A", None]])
def test_a_row_without_answers_is_named(folder: Path, missing: list[str | None] | None) -> None:
    file = folder / "vqav2" / "val-0.parquet"
    change(file, answers=[["A"] * 10, missing, ["C"] * 10, ["D"] * 10])
    with pytest.raises(UserError, match=f"{file}, row 1, column 'answers'"):
        load_tasks(["vqav2"], metadata={"folder": str(folder)})


def test_the_experiment_asks_for_both_and_ends_early(folder: Path) -> None:
    config = load("experiment=table3", f"tasks.folder={folder}", "model=llava_v15_7b")
    assert config.tasks.names == ["vizwiz", "vqav2"]
    assert config.tasks.chat_template
    assert load("experiment=table3_sqa", "model=llava_v15_7b").tasks.names == []

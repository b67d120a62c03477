"""Committed answers give back the records they are of, in a few kilobytes, without texts."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from qvlm.data import miniature
from qvlm.errors import RunError, UserError
from qvlm.evaluation.metrics import class_metrics
from qvlm.records.record import Record
from qvlm.tables.answers import (
    FACTS,
    QUESTIONS,
    SUFFIX,
    letters_of,
    obstacle,
    questions,
    questions_file,
    read_answers,
    read_facts,
    read_questions,
    write_answers,
)
from tests.helpers.records import make_record

pytestmark = pytest.mark.slow

COLUMNS = ["question_id", "subject", "grade", "skill", "has_image", "has_text", "n_choices"]
COLUMNS += ["answer", "prediction", "correct", "cut"]


@pytest.fixture
def record(runs: Path) -> Record:
    return make_record(runs, generated=True, n=500)


def test_what_is_read_is_what_was_written(record: Record, tmp_path: Path) -> None:
    fp = make_record(record.path.parent, bits="FP", accuracy=90.0, generated=True)
    folder = tmp_path / "answers"
    write_answers(folder, [record, fp])
    for written, found in zip((fp, record), read_answers(folder), strict=True):
        assert found.name == written.name
        assert found.metrics == written.metrics
        assert found.layers == written.layers
        assert (found.bits, found.method, found.model) == (
            written.bits,
            written.method,
            written.model,
        )
        pd.testing.assert_frame_equal(
            found.predictions[COLUMNS], written.predictions[COLUMNS], check_dtype=False
        )


def test_what_follows_is_not_kept_in_a_cell(record: Record, tmp_path: Path) -> None:
    write_answers(tmp_path / "answers", [record])
    (file,) = (tmp_path / "answers").iterdir()
    content = json.loads(gzip.decompress(file.read_bytes()))
    assert len(content["answers"]) == 500
    assert "classes" not in content["metrics"]


def test_the_questions_are_those_of_the_problems() -> None:
    asked = questions("test", 0)
    problems = miniature.generate("test", 4000, 0)
    assert list(asked["answer"]) == [problem["answer"] for problem in problems]
    assert list(asked["has_image"]) == [problem["image"] is not None for problem in problems]


KEPT = sorted(Path("results/answers", QUESTIONS).iterdir())


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.name)
def test_the_committed_questions_are_those_that_are_generated(file: Path) -> None:
    split, seed = file.name.partition(".")[0].split("-")
    assert questions_file(Path("results/answers/table2"), split, int(seed)) == file
    pd.testing.assert_frame_equal(read_questions(file), questions(split, int(seed)))


def test_kept_questions_are_not_generated(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_answers(tmp_path / "answers" / "page", [record])
    monkeypatch.setattr("qvlm.tables.answers.questions", None)
    (found,) = read_answers(tmp_path / "answers" / "page")
    assert found.metrics == record.metrics


def test_questions_that_are_not_kept_are_generated(record: Record, tmp_path: Path) -> None:
    folder = tmp_path / "answers" / "page"
    write_answers(folder, [record])
    questions_file(folder, "test", 0).unlink()
    (found,) = read_answers(folder)
    assert found.metrics == record.metrics


@pytest.mark.parametrize(
    "damage",
    [b"", b"\x1f\x8b", gzip.compress(b"skill,grade\na,b\n")],
    ids=["empty", "cut", "other"],
)
def test_damaged_questions_are_named(record: Record, tmp_path: Path, damage: bytes) -> None:
    folder = tmp_path / "answers" / "page"
    write_answers(folder, [record])
    file = questions_file(folder, "test", 0)
    file.write_bytes(damage)
    with pytest.raises(RunError, match=file.name):
        read_answers(folder)


def test_a_file_is_small_and_says_nothing_of_the_machine(record: Record, tmp_path: Path) -> None:
    run = {**record.run, "command": f"python {tmp_path}/run.py", "started": "12:00"}
    model = {**record.config["model"], "path": str(tmp_path / "checkpoint")}
    config = {**record.config, "model": model, "results_dir": str(tmp_path)}
    write_answers(tmp_path / "answers", [replace(record, run=run, config=config)])
    (file,) = (tmp_path / "answers").iterdir()
    assert file.stat().st_size < 4096
    assert str(tmp_path) not in gzip.decompress(file.read_bytes()).decode()
    (found,) = read_answers(tmp_path / "answers")
    assert found.config["model"]["name"] == "mini_llava"


def test_the_same_record_gives_the_same_bytes(record: Record, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_answers(tmp_path / name, [record])
    (a,), (b,) = ((tmp_path / name).iterdir() for name in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()


def test_a_random_choice_is_drawn_again(record: Record, tmp_path: Path) -> None:
    scored = record.predictions.copy()
    asked = scored["prediction"].isna()
    assert asked.sum() > 5
    write_answers(tmp_path / "a", [record])
    (wrong,) = read_answers(tmp_path / "a")
    assert not wrong.predictions["correct"][asked].any()
    rule = replace(record, metrics={**record.metrics, "unparsable_rule": "random"})
    assert "column correct does not follow" in str(obstacle(rule))


def test_a_record_that_is_refused_keeps_its_false_metrics(runs: Path, tmp_path: Path) -> None:
    def lie(classes: dict[str, Any]) -> None:
        classes["IMG"]["accuracy"] = 99.0

    record = make_record(runs, generated=True, metrics=lie)
    write_answers(tmp_path / "answers", [record])
    (found,) = read_answers(tmp_path / "answers")
    assert found.metrics["classes"]["IMG"]["accuracy"] == 99.0
    assert class_metrics(found.predictions)["IMG"]["accuracy"] != 99.0


def test_problems_of_another_source_are_not_kept(runs: Path, record: Record) -> None:
    assert obstacle(record) is None
    assert obstacle(make_record(runs, "AWQ")) == "its problems are not generated"
    data = {**record.config["data"], "seed": 1}
    assert "does not follow" in str(
        obstacle(replace(record, config={**record.config, "data": data}))
    )


def test_answers_of_an_older_page_are_replaced(record: Record, runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    write_answers(folder, [record], {"seconds": 1.5})
    assert read_facts(folder) == {"seconds": 1.5}
    other = make_record(runs, "AWQ", generated=True)
    write_answers(folder, [other])
    assert [found.method for found in read_answers(folder)] == ["AWQ"]
    with pytest.raises(RunError, match=FACTS):
        read_facts(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("answers"),
        lambda content: content.update(answers="!" * 500),
        lambda content: content.update(layers=3),
        lambda content: content["config"].pop("data"),
    ],
)
def test_a_damaged_file_is_named(record: Record, tmp_path: Path, change: Any) -> None:
    write_answers(tmp_path / "answers", [record])
    file = tmp_path / "answers" / f"{record.name}{SUFFIX}"
    content = json.loads(gzip.decompress(file.read_bytes()))
    change(content)
    file.write_bytes(gzip.compress(json.dumps(content).encode()))
    with pytest.raises(RunError, match=record.name):
        read_answers(tmp_path / "answers")
    file.write_bytes(b"\x1f\x8b")
    with pytest.raises(RunError, match=record.name):
        read_answers(tmp_path / "answers")


def test_other_questions_are_noticed(record: Record, tmp_path: Path) -> None:
    folder = tmp_path / "answers" / "page"
    write_answers(folder, [record])
    changed = questions("test", 0).assign(answer=0).drop(columns="question_id")
    changed.to_csv(questions_file(folder, "test", 0), index=False)
    with pytest.raises(RunError, match="not those that were answered"):
        read_answers(folder)


def test_a_folder_that_cannot_be_written_is_the_users_error(record: Record, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        write_answers(tmp_path / "file" / "answers", [record])


def test_letters_name_choices(record: Record) -> None:
    letters = letters_of(record)
    for letter, choice in zip(letters, record.predictions["prediction"], strict=True):
        assert letter == ("-" if pd.isna(choice) else "ABCDEFGHIJ"[choice])

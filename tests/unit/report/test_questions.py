"""Questions are chosen by the rule that the page states, and only generated ones are shown."""

from collections import Counter
from pathlib import Path

import datasets
import pandas as pd
import pytest
from PIL import Image

from qvlm.data.scienceqa import COLUMNS
from qvlm.report import questions
from qvlm.report.content import Content
from qvlm.report.questions import asked, choose
from tests.helpers.records import make_predictions, make_record

SECRET = "A text that may not be passed on"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What is loaded, instead of data sets: 60 rows, of which every other has an image."""
    calls: list[tuple[object, ...]] = []
    frame = make_predictions(50, 60)

    def load(source: str, split: str, limit: int | None, seed: int) -> datasets.Dataset:
        calls.append((source, split, limit, seed))
        rows = [
            {
                **dict.fromkeys(COLUMNS, "x"),
                "image": Image.new("RGB", (480, 320), (row, 0, 0)) if row % 2 else None,
                "question": SECRET,
                "hint": "",
                "choices": ["red", "green", "blue"],
                "answer": frame["answer"][row],
                "skill": frame["skill"][row],
            }
            for row in range(60)
        ]
        found = datasets.Dataset.from_list(rows, features=COLUMNS)
        return found.add_column("question_id", [f"test-{row}" for row in range(60)])

    monkeypatch.setattr(questions, "load_scienceqa", load)
    return calls


def test_every_skill_and_every_lost_question_is_there(tmp_path: Path) -> None:
    full = make_record(tmp_path, bits="FP", accuracy=90, n=300)
    low = make_record(tmp_path, "RTN", accuracy=50, n=300, seed=1)
    order = list(full.predictions["question_id"])
    skills = full.predictions.set_index("question_id")["skill"]
    spread = choose([full, low], least=30, per_method=0)
    assert len(spread) == 30
    assert spread == sorted(spread, key=order.index)
    assert set(Counter(skills[spread]).values()) == {5}  # six skills
    for skill in skills.unique():
        own = [name for name in order if skills[name] == skill]
        assert [name for name in spread if skills[name] == skill] == own[:5]
    right = [set(r.predictions["question_id"][r.predictions["correct"]]) for r in (full, low)]
    lost = [name for name in order if name in right[0] - right[1]]
    assert choose([full, low], least=0, per_method=10) == lost[:10]
    assert choose([full, low], least=10**6) == order


def test_the_answers_are_those_of_the_records(
    tmp_path: Path, loaded: list[tuple[object, ...]]
) -> None:
    records = [make_record(tmp_path, bits="FP", n=60), make_record(tmp_path, "AWQ", n=60, seed=2)]
    content = Content.of(records)
    (group,) = asked(content)
    assert loaded == [("miniature", "test", None, 0)]
    assert len(group.questions) == group.total == 60
    assert group.bits == ["FP", "W4A4"]
    assert group.matrix == {"mini_llava": [("FP", [0, None]), ("AWQ", [None, 1])]}
    for question in group.questions:
        for record in records:
            row = record.predictions.set_index("question_id").loc[question.id]
            answer = question.answers[content.numbers[record.name]]
            assert answer.correct == row["correct"]
            said = row["prediction"]
            assert answer.letter == ("-" if pd.isna(said) else "ABC"[said])
        image = int(question.id.removeprefix("test-")) % 2
        assert bool(question.image) == bool(image)
        assert question.size == ((320, 213) if image else (0, 0))


def test_texts_of_other_data_stay_here(tmp_path: Path, loaded: list[tuple[object, ...]]) -> None:
    data = {"name": "scienceqa", "source": "/data", "split": "test", "seed": 0}
    record = make_record(tmp_path, n=60, data=data)
    (group,) = asked(Content.of([record]))
    assert group.missing == questions.WITHHELD
    assert not group.questions
    assert loaded == []
    (private,) = asked(Content.of([record]), private=True)
    assert not private.missing
    assert private.questions[0].text == SECRET


def test_a_data_set_that_changed_is_noticed(
    tmp_path: Path, loaded: list[tuple[object, ...]]
) -> None:
    record = make_record(tmp_path, n=60)
    assert asked(Content.of([record]))[0].questions
    record.predictions.loc[30, "answer"] = (record.predictions["answer"][30] + 1) % 3
    (group,) = asked(Content.of([record]))
    assert group.missing == questions.CHANGED
    assert not group.questions

"""A full-precision run is compared with published answers, and its verdict follows by rule."""

from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from qvlm.errors import UserError
from qvlm.evaluation.metrics import class_metrics
from qvlm.records.record import Record, write_record
from qvlm.tables import gate
from qvlm.tables.published_answers import published_predictions
from tests.helpers.pages import cells
from tests.helpers.records import make_record

V13 = published_predictions("llava_v13_13b")


def record_of(
    runs: Path,
    predictions: pd.DataFrame,
    bits: str = "FP",
    stands_for: str | None = "llava_13b",
    temperature: float = 0.0,
) -> Record:
    """The record of a run that chose so."""
    right = predictions["prediction"].fillna(-1) == predictions["answer"]
    predictions = predictions.assign(correct=right, skill="", text="")
    planted = make_record(runs, bits=bits, evaluation={"temperature": temperature})
    config = {**planted.config, "model": {**planted.config["model"], "stands_for": stands_for}}
    metrics = {"classes": class_metrics(predictions)}
    return write_record(planted.path, config, planted.run, metrics, predictions, planted.layers)


def changed(count: int) -> pd.DataFrame:
    """The published answers with another choice on `count` questions."""
    some = np.random.default_rng(0).permutation(V13.index[V13["prediction"].notna()])[:count]
    prediction = V13["prediction"].copy()
    prediction[some] = 1 - prediction[some].clip(upper=1)
    return V13.assign(prediction=prediction)


def test_the_same_answers_are_believed(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = record_of(runs, V13)
    assert gate.main([str(record.path)]) == 0
    out = capsys.readouterr().out
    assert "Quantized rows may be believed: 100.00 % agree" in out
    assert "90.19 to 91.91" in out  # Wilson's interval around 91.09
    assert "Unparsable: 4 here, 4 as published" in out
    average = next(cells(line) for line in out.splitlines() if line.startswith("| Avg"))
    assert average[1:6] == ["4241", "100.00", "91.09", "91.09", "0.00"]


def test_another_training_of_the_same_accuracy_is_not_believed(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_of(runs, published_predictions("llava_v0_13b"))
    assert 90.19 < record.metrics["classes"]["Avg"]["accuracy"] < 91.91
    assert gate.main([str(record.path)]) == 1
    out, err = capsys.readouterr()
    assert "not believed: 91.58 % agree" in err
    assert "Other choices: 357" in out


@pytest.mark.parametrize(
    ("count", "code", "words"),
    [
        (84, 0, "may be believed: 98.02 %"),
        (85, 1, "are undecided: 98.00 %"),
        (186, 1, "are undecided: 95.61 %"),
        (187, 1, "are not believed: 95.59 %"),
    ],
)
def test_the_rule(
    runs: Path, capsys: pytest.CaptureFixture[str], count: int, code: int, words: str
) -> None:
    assert gate.main([str(record_of(runs, changed(count)).path)]) == code
    assert words in "".join(capsys.readouterr())


def test_a_sampled_run_of_the_same_model_decides(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy = record_of(runs, changed(100))
    for count, code in ((80, 0), (20, 1)):
        prediction = greedy.predictions["prediction"].copy()
        prediction[: 2 * count : 2] = (prediction[: 2 * count : 2] + 1) % 2
        other = runs.parent / f"other{count}"
        answers = greedy.predictions.assign(prediction=prediction)
        sampled = record_of(other, answers, temperature=0.2)
        said = gate.main([str(greedy.path), "--sampled", str(sampled.path)])
        words = "".join(capsys.readouterr())
        assert said == code, words
        assert "sampling explains any share from" in words


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"temperature": 1.0}, "at temperature 1, and the published answers are of 0.2"),
        ({}, "at temperature 0, and"),
        ({"temperature": 0.2, "bits": "W4A4"}, "not a run of the same model in full precision"),
    ],
)
def test_another_sampled_run_explains_nothing(
    runs: Path, capsys: pytest.CaptureFixture[str], how: dict[str, Any], words: str
) -> None:
    greedy = record_of(runs, changed(1500))
    sampled = record_of(runs.parent / "other", V13, **how)
    assert gate.main([str(greedy.path), "--sampled", str(sampled.path)]) == 2
    assert words in capsys.readouterr().err


def test_a_run_without_problems_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = make_record(runs, bits="FP", tasks={"x": 0.5})
    assert gate.main([str(record.path), "--published", "llava_v13_13b"]) == 2
    assert "is a run on tasks" in capsys.readouterr().err


def test_the_least_agreement_that_sampling_explains() -> None:
    other = V13.assign(prediction=V13["prediction"].where(V13.index >= 127, 9))
    share = 1 - 127 / 4241
    expected = share - 2.3263 * sqrt(2 * share * (1 - share) / 4241)
    assert gate.least_agreement(V13, other) == pytest.approx(100 * expected, abs=1e-3)
    with pytest.raises(UserError, match="not asked the questions"):
        gate.least_agreement(V13, other.iloc[1:])


def test_the_thresholds_follow_from_their_derivation() -> None:
    confidence = np.linspace(0.5, 1, 200_001)
    sampled = (1 - confidence) ** 5 / (confidence**5 + (1 - confidence) ** 5)
    # A share w of the questions has these confidences, and a quarter of those are answered wrong.
    assert 4 * sampled.mean() == pytest.approx(0.27, abs=0.005)
    errors = (V13["correct"] == False).mean()  # noqa: E712
    assert errors * 4 * sampled.mean() == pytest.approx(0.024, abs=0.0005)
    # Greedy and sampled answers of mini_moe_llava: 214 of 4,000 differ, 544 are wrong.
    changes = errors * 214 / 544
    assert changes == pytest.approx(0.035, abs=0.0005)
    limit = changes + 3 * sqrt(changes * (1 - changes) / len(V13))
    assert pytest.approx(100 * (1 - limit), abs=0.1) == gate.EXPLAINED
    assert 1.96 * 100 * sqrt(84) / len(V13) == pytest.approx(0.42, abs=0.005)


def test_questions_are_joined_by_the_authors_ids(runs: Path) -> None:
    shuffled = V13.sample(frac=1, random_state=0)
    shuffled["question_id"] = [f"test-{index}" for index in range(len(shuffled))]
    joined = gate.beside_published(record_of(runs, shuffled), "llava_v13_13b")
    assert gate.class_rows(joined)[-1].same == len(V13)
    unnamed = record_of(runs, shuffled.drop(columns="official_id"))
    with pytest.raises(UserError, match="have another right answer than published"):
        gate.beside_published(unnamed, "llava_v13_13b")
    ordered = record_of(runs, V13.assign(official_id=None))
    assert gate.class_rows(gate.beside_published(ordered, "llava_v13_13b"))[-1].same == len(V13)


def test_classes_that_differ_are_named(runs: Path) -> None:
    blind = V13.assign(prediction=V13["prediction"].where(~V13["has_image"], 0))
    rows = gate.class_rows(gate.beside_published(record_of(runs, blind), "llava_v13_13b"))
    differing = {row.name for row in rows if row.differs}
    assert {"IMG", "Avg"} <= differing
    assert "NO" not in differing
    (image,) = (row for row in rows if row.name == "IMG")
    assert image.published == pytest.approx(88.30, abs=0.005)
    assert image.accuracy < 60


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(bits="W4A4"), "is not a run in full precision"),
        (dict(stands_for="moe_llava"), "is not a checkpoint with published answers"),
    ],
)
def test_other_runs_are_the_users_error(
    runs: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str], words: str
) -> None:
    record = record_of(runs, V13, **change)
    assert gate.main([str(record.path)]) == 2
    assert words in capsys.readouterr().err


def test_a_part_of_the_questions_decides_nothing(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gate.main([str(record_of(runs, V13.iloc[:400]).path)]) == 1
    assert "the run has 400 of the 4241 questions" in capsys.readouterr().err
    miniature = make_record(runs, bits="FP", n=200)
    assert gate.main([str(miniature.path), "--published", "llava_v13_13b"]) == 2
    assert "another right answer" in capsys.readouterr().err

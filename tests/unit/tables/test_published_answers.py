"""Published answers, through our metrics and tables, give the accuracies that were published."""

from pathlib import Path

import pandas as pd
import pytest

from qvlm.data.sizes import PUBLISHED_CLASSES, PUBLISHED_QUESTIONS
from qvlm.errors import UserError
from qvlm.evaluation.metrics import class_metrics
from qvlm.records.record import find_records, write_record
from qvlm.tables.published_answers import CHECKPOINTS, published_predictions
from qvlm.tables.table2 import build
from tests.helpers.records import make_record

# The results of the LLaVA repository: Avg, TXT, IMG, NO.
PUBLISHED = {
    "llava_v13_13b": (91.09, 89.83, 88.30, 91.08),
    "llava_v0_13b": (90.92, 89.49, 88.00, 90.66),
    "llava_v15_13b": (74.39, 74.05, 71.64, 73.52),
}
CLASSES = ("Avg", "TXT", "IMG", "NO")


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_metrics_and_table_give_the_published_accuracies(checkpoint: str, runs: Path) -> None:
    predictions = published_predictions(checkpoint)
    classes = class_metrics(predictions)
    assert [round(classes[name]["accuracy"], 2) for name in CLASSES] == list(PUBLISHED[checkpoint])
    planted = make_record(runs, bits="FP")
    written = {**planted.metrics, "classes": classes}
    predictions = predictions.assign(skill="", text="")
    write_record(planted.path, planted.config, planted.run, written, predictions, [])
    frame = build(find_records(runs)).set_index("class")
    assert tuple(frame.loc[list(CLASSES), "accuracy"]) == PUBLISHED[checkpoint]
    assert set(frame["method"]) == {"FP"}


def test_the_questions_are_those_of_the_test_split() -> None:
    known = published_predictions("llava_v13_13b")
    assert len(known) == PUBLISHED_QUESTIONS == known["official_id"].nunique()
    assert known["has_image"].sum() == PUBLISHED_CLASSES["IMG"]
    assert known["official_id"].astype(int).is_monotonic_increasing
    assert (known["question_id"].iloc[0], known["official_id"].iloc[0]) == ("test-0", "4")
    assert known["prediction"].isna().sum() == 4
    several = known["n_choices"] > 0
    assert (known["answer"] < known["n_choices"])[several].all()
    assert set(known["subject"]) == {
        "",
        "natural science",
        "social science",
        "language science",
    }
    assert known.loc[known["grade"] != "", "grade"].str.fullmatch("grade[0-9]+").all()


def test_a_change_of_one_answer_shows() -> None:
    known = published_predictions("llava_v13_13b")
    wrong = known.index[~known["correct"]][0]
    changed = known.assign(correct=known["correct"].where(known.index != wrong, True))
    assert class_metrics(changed)["Avg"]["accuracy"] == pytest.approx(100 * 3864 / 4241)


def test_an_unknown_checkpoint_is_the_users_error() -> None:
    with pytest.raises(UserError, match="Choose one of: llava_v13_13b"):
        published_predictions("llava_7b")
    assert isinstance(published_predictions("llava_v13_13b"), pd.DataFrame)

"""The published answers of ScienceQA's test split, question by question, as predictions.

`paper/answers.csv` has the right choice of each of the 4,241 questions, and the choices that the
authors' script parsed from the answers that the LLaVA repository publishes for three checkpoints.
It holds numbers only, and none of ScienceQA's texts or images.
"""

from functools import lru_cache

import pandas as pd

from qvlm.data.sizes import SUBJECTS
from qvlm.errors import UserError
from qvlm.tables.published import published

# Column of each checkpoint, and its name.
CHECKPOINTS = {
    "llava_v13_13b": "LLaVA-v1.3-13B",
    "llava_v0_13b": "LLaVA-v0-13B",
    "llava_v15_13b": "LLaVA-v1.5-13B, prompt format CQM-A",
}
# Checkpoint behind the rows of one of the paper's models.
BEHIND = {"llava_13b": "llava_v13_13b"}


@lru_cache(maxsize=1)
def _answers() -> pd.DataFrame:
    return published("answers")


def published_predictions(checkpoint: str) -> pd.DataFrame:
    """Returns the published answers of a checkpoint in the form of `predictions.parquet`.

    Args:
        checkpoint: One of `CHECKPOINTS`.

    Returns:
        A row per question of the test split, in the published order, with `question_id` ("test-0",
        "test-1", ...), `official_id`, `subject`, `grade` (both "" where they are not known),
        `has_image`, `has_text`, `n_choices` (0 where it is not known), `answer`, `prediction`
        (missing if unparsable) and `correct`.

    Raises:
        UserError: If no answers of the checkpoint are known.
    """
    if checkpoint not in CHECKPOINTS:
        raise UserError(
            f"{checkpoint} is not a checkpoint with published answers. "
            f"Choose one of: {', '.join(CHECKPOINTS)}."
        )
    known = _answers()
    chosen = known[checkpoint]
    subjects = {name.partition(" ")[0]: name for name in SUBJECTS}
    grades = known["grade"].astype("Int64").astype("string")
    return pd.DataFrame(
        {
            "question_id": [f"test-{index}" for index in range(len(known))],
            "official_id": known["question_id"].astype(str),
            "subject": known["subject"].map(subjects).fillna(""),
            "grade": ("grade" + grades).fillna(""),
            "has_image": known["image"] == 1,
            "has_text": known["text"] == 1,
            "n_choices": known["choices"],
            "answer": known["answer"],
            "prediction": chosen.astype("Int64").mask(chosen < 0),
            "correct": chosen == known["answer"],
        }
    )

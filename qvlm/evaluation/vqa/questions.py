"""Questions about photographs with ten people's answers each, and how an answer is scored.

An answer scores the share of min(1, n / 3) over all choices of nine of the ten people, of whom n
gave the same answer (Antol et al., VQA, 2015). Answers are compared without case, articles and
punctuation, and number words as digits. The paper's numbers are of the test splits, whose answers
are not public; these tasks are for the validation splits.

`tasks.folder` holds the data: a folder for each task, with parquet files in it whose columns
include `image`, `question` and `answers`, a list of texts or of mappings with a text `answer`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from qvlm.data.prompts import IMAGE_TOKEN
from qvlm.errors import UserError

NAMES = {"vqav2": "VQAv2", "vizwiz": "VizWiz"}

_SHORT = "Answer the question using a single word or phrase."
_UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
_COLUMNS = ("image", "question", "answers")
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_ARTICLES = ("a", "an", "the")


def require_data(tasks: Sequence[str], folder: str | None) -> None:
    """Makes sure that the data of the tasks are where `tasks.folder` says.

    Raises:
        UserError: If a task of this module is asked for and has no file there.
    """
    for name in filter(NAMES.__contains__, tasks):
        if folder is None or not _files(folder, name):
            place = f"{folder or 'FOLDER'}/{name}"
            raise UserError(
                f"task={name} needs the validation questions of {NAMES[name]}, which qvlm neither "
                f"ships nor fetches. Give tasks.folder=FOLDER with parquet files in {place}."
            )


def documents(folder: str, name: str, **_: Any) -> dict[str, datasets.Dataset]:
    """Opens the questions of a task for lm-eval. Images stay encoded.

    Args:
        folder: Folder of `tasks.folder`.
        name: Name of the task.

    Raises:
        UserError: If there are no files, or a column is missing.
    """
    require_data([name], folder)
    rows = datasets.load_dataset("parquet", data_files=_files(folder, name), split="train")
    for column in _COLUMNS:
        if column not in rows.column_names:
            raise UserError(f"tasks.folder: {folder}/{name} has no column {column}.")
    rows = rows.select_columns(list(_COLUMNS))
    return {"test": rows.cast_column("image", datasets.Image(decode=False))}


def prompt(doc: Mapping[str, Any]) -> str:
    """Returns a question of VQAv2 as LLaVA-1.5 was tuned to be asked."""
    return f"{IMAGE_TOKEN}\n{doc['question']}\n{_SHORT}"


def vizwiz_prompt(doc: Mapping[str, Any]) -> str:
    """Returns a question of VizWiz, which may have no answer."""
    return f"{IMAGE_TOKEN}\n{doc['question']}\n{_UNANSWERABLE}\n{_SHORT}"


def image(doc: Mapping[str, Any]) -> list[Any]:
    """Returns the encoded image of a question in a list."""
    return [doc["image"]]


def target(doc: Mapping[str, Any]) -> str:
    """Returns the first of people's answers, for the samples that a record keeps."""
    return _given(doc)[0]


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Returns the accuracy of one answer, from 0 to 1."""
    said = normalize(results[0])
    same = [normalize(answer) == said for answer in _given(doc)]
    shares = [min(1.0, (sum(same) - own) / 3) for own in same]
    return {"accuracy": sum(shares) / len(shares)}


def normalize(answer: str) -> str:
    """Returns an answer in the form in which answers are compared."""
    text = re.sub(r"(?<=\d),(?=\d)", "", answer.lower()).replace("'", "")
    words = re.sub(r"[^\w.]|\.(?!\d)|_", " ", text).split()
    digits = [str(_NUMBERS.index(word)) if word in _NUMBERS else word for word in words]
    return " ".join(word for word in digits if word not in _ARTICLES)


def _given(doc: Mapping[str, Any]) -> list[str]:
    return [each["answer"] if isinstance(each, Mapping) else each for each in doc["answers"]]


def _files(folder: str, name: str) -> list[str]:
    return sorted(map(str, (Path(folder) / name).rglob("*.parquet")))

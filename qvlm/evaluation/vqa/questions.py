"""Questions about photographs with ten people's answers each, and how an answer is scored.

An answer scores the share of min(1, n / 3) over all choices of nine of the ten people, of whom n
gave the same answer (Antol et al., VQA, 2015). Answers are compared without case, articles and
punctuation, and number words as digits. The paper's numbers are of the test splits, whose answers
are not public; these tasks are for the validation splits.

`tasks.folder` holds the data: a folder for each task, with parquet files in it whose columns
include `image`, `question` and `answers`, a list of texts or of mappings with a text `answer`.
Where names of files or folders tell splits apart, as the hub's do, only validation files count.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet

from qvlm.data.prompts import IMAGE_TOKEN
from qvlm.errors import UserError
from qvlm.evaluation.vqa import NAMES
from qvlm.records.provenance import content_hash

_SHORT = "Answer the question using a single word or phrase."
_UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
_COLUMNS = ("image", "question", "answers")
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_ARTICLES = ("a", "an", "the")
_VALIDATION = ("validation", "valid", "val")
_OTHER_SPLITS = ("train", "training", "test", "testdev", "testing")


def require_data(tasks: Sequence[str], folder: str | None) -> None:
    """Makes sure that the data of the tasks are where `tasks.folder` says.

    Raises:
        UserError: If a task of this module is asked for and has no file there, or files of other
            splits alone.
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
        UserError: If there are no files of the validation split, a column is missing, or a row has
            no answers.
    """
    require_data([name], folder)
    files = _files(folder, name)
    for file in files:
        _check_file(file)
    # The cache of `datasets` tells files apart by path and time, so its entry is named by content.
    rows = datasets.load_dataset(
        "parquet",
        name=content_hash(Path(folder) / name, (".parquet",)),
        data_files=[str(file) for file in files],
        split="train",
    )
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


def _check_file(file: Path) -> None:
    """Checks that a file has all columns, and answers in every row.

    Raises:
        UserError: If a column is missing, or a row has anything but a list of texts, or of mappings
            with a text `answer`.
    """
    content = pyarrow.parquet.ParquetFile(file)
    for column in _COLUMNS:
        if column not in content.schema_arrow.names:
            raise UserError(f"tasks.folder: {file} has no column {column}.")
    row = 0
    for batch in content.iter_batches(batch_size=4096, columns=["answers"]):
        for answers in batch.column("answers").to_pylist():
            given = answers if isinstance(answers, list) else []
            texts = [each.get("answer") if isinstance(each, dict) else each for each in given]
            if not texts or not all(isinstance(text, str) for text in texts):
                raise UserError(
                    f"tasks.folder: {file}, row {row}, column 'answers': there is no list of "
                    "answers. Give the validation split, whose answers are public."
                )
            row += 1


def _files(folder: str, name: str) -> list[Path]:
    """Returns the validation files of a task, sorted; all files where no name tells a split.

    Raises:
        UserError: If there are files of other splits and none of validation.
    """
    place = Path(folder) / name
    files = sorted(place.rglob("*.parquet"))
    splits = {file: _split(file.relative_to(place)) for file in files}
    validation = [file for file in files if splits[file] == "validation"]
    others = [file for file in files if splits[file] == "other"]
    if others and not validation:
        raise UserError(
            f"tasks.folder: {place} has no file of the validation split, but {others[0].name} of "
            "another. Give files whose names begin with val or validation."
        )
    return validation or files


def _split(file: Path) -> str | None:
    """Returns "validation" or "other" for the split that a path names last; None if it has none."""
    for word in reversed(re.findall("[a-z]+", str(file).lower())):
        if word in _VALIDATION:
            return "validation"
        if word in _OTHER_SPLITS:
            return "other"
    return None

"""The one validator of problems: rows of any source are checked, completed and converted.

A fault is one sentence with the file, the row, the column and what is accepted. A data set that
passes can be evaluated, calibrated on and tracked.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from qvlm.data.images import PLAIN_MODES, as_png, decode, to_rgb
from qvlm.data.prompts import LETTERS
from qvlm.data.sizes import SUBJECTS
from qvlm.errors import UserError

Row = Mapping[str, Any]

_TEXT = datasets.Value("string")
# The grades that have a class.
GRADES = tuple(f"grade{number}" for number in range(1, 13))
# The columns of `derek-thomas/ScienceQA`.
COLUMNS = datasets.Features(
    {
        "image": datasets.Image(),
        "question": _TEXT,
        "choices": datasets.List(_TEXT),
        "answer": datasets.Value("int8"),
        "hint": _TEXT,
        "task": _TEXT,
        "grade": _TEXT,
        "subject": _TEXT,
        "topic": _TEXT,
        "category": _TEXT,
        "skill": _TEXT,
        "lecture": _TEXT,
        "solution": _TEXT,
    }
)
# The same for every source: "test-17" for row 17 of the test split. `official_id` is the id that
# the authors of ScienceQA gave a problem, where the source has it, and null elsewhere.
FEATURES = datasets.Features({**COLUMNS, "question_id": _TEXT, "official_id": _TEXT})
# A null in one of these reads as "". A row whose grade or subject is "" is in none of the classes.
OPTIONAL_TEXTS = tuple(
    column for column, kind in COLUMNS.items() if kind == _TEXT and column != "question"
)


def require_columns(present: Iterable[str], where: str) -> None:
    """Checks that every column of `COLUMNS` is there.

    Raises:
        UserError: If a column is missing.
    """
    names = set(present)
    missing = [column for column in COLUMNS if column not in names]
    if missing:
        raise UserError(
            f"{where}: column {missing[0]!r} is missing. A problem has the columns "
            f"{', '.join(COLUMNS)}."
        )


def validated(
    rows: Iterable[Row], where: Callable[[int], str], folder: Path | None
) -> datasets.Dataset:
    """Checks rows and returns them as a data set with the columns of `FEATURES`.

    Images of unusual modes (CMYK, 16-bit, float) are converted to RGB, and null optional texts
    become empty.

    Args:
        rows: Rows with the columns of `FEATURES`, each image None or `{"bytes": ..., "path": ...}`.
        where: Function that names the file and row of a position in `rows`, for messages.
        folder: Folder that image paths are relative to and may not leave; None accepts no paths.

    Raises:
        UserError: If a row has a fault.
    """
    checked = []
    for position, row in enumerate(rows):
        try:
            checked.append(_validated_row(row, folder))
        except _Fault as fault:
            raise UserError(
                f"{where(position)}, column {fault.column!r}: {fault.found}. {fault.accepted}"
            ) from fault
    _warn_of_no_class(checked, where)
    return datasets.Dataset.from_list(checked, features=FEATURES)


def _warn_of_no_class(rows: Sequence[Row], where: Callable[[int], str]) -> None:
    """Says so if a subject or grade is not one of ScienceQA's, for example "Grade 3"."""
    for column, known, classes in (
        ("subject", SUBJECTS, ", ".join(SUBJECTS)),
        ("grade", GRADES, f"{GRADES[0]} to {GRADES[-1]}"),
    ):
        others = [at for at, row in enumerate(rows) if row[column] and row[column] not in known]
        if others:
            warnings.warn(
                f"{where(others[0])}, column {column!r}: {_shown(rows[others[0]][column])} has no "
                f"class. {len(others)} of {len(rows)} problems have such a {column} and count only "
                f"in the average. Classes have {classes}; give null for none.",
                stacklevel=2,
            )


class _Fault(Exception):
    """What is wrong in a column, and what it accepts; both are sentences."""

    def __init__(self, column: str, found: str, accepted: str) -> None:
        super().__init__(found)
        self.column, self.found, self.accepted = column, found, accepted


def _validated_row(row: Row, folder: Path | None) -> dict[str, Any]:
    choices = _choices(row["choices"])
    return {
        **row,
        **{column: _text(column, row[column], optional=True) for column in OPTIONAL_TEXTS},
        "question": _text("question", row["question"]),
        "choices": choices,
        "answer": _answer(row["answer"], len(choices)),
        "image": _image(row["image"], folder),
    }


def _text(column: str, value: Any, optional: bool = False) -> str:
    if value is None and optional:
        return ""
    accepted = "Give a text, or null for an empty one." if optional else "Give a text."
    if not isinstance(value, str):
        found = "the value is null" if value is None else f"{_shown(value)} is not a text"
        raise _Fault(column, found, accepted)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _Fault(column, f"{_shown(value)} is not valid Unicode", accepted) from error
    return value


def _choices(value: Any) -> list[str]:
    most = len(LETTERS)
    accepted = f"Give a list of 1 to {most} texts, which get the letters A to {LETTERS[-1]}."
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        found = "the value is null" if value is None else f"{_shown(value)} is not a list"
        raise _Fault("choices", found, accepted)
    if not 1 <= len(value) <= most:
        raise _Fault("choices", f"the list has {len(value)} choices", accepted)
    try:
        return [_text("choices", choice) for choice in value]
    except _Fault as fault:
        raise _Fault("choices", f"in the list, {fault.found}", accepted) from fault


def _answer(value: Any, choices: int) -> int:
    accepted = f"Give the index of the right choice, 0 to {choices - 1}."
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas turns a column of integers with a null into floats
    if isinstance(value, bool) or not isinstance(value, int):
        found = "the value is null" if value is None else f"{_shown(value)} is not an index"
        raise _Fault("answer", found, accepted)
    if not 0 <= value < choices:
        raise _Fault("answer", f"{value} is not the index of one of {choices} choices", accepted)
    return value


def _image(value: Any, folder: Path | None) -> dict[str, Any] | None:
    if value is None:
        return None
    accepted = "Give an image file that Pillow reads, inside the folder of the data, or null."
    if not isinstance(value, Mapping) or not {"bytes", "path"} & set(value):
        raise _Fault("image", f"{_shown(value)} is not an image", accepted)
    content = value.get("bytes")
    if content is None:
        content = _file_content(value.get("path"), folder, accepted)
    try:
        image = decode(content)
    except ValueError as error:
        raise _Fault("image", f"it does not decode ({_first_line(error)})", accepted) from error
    if image.mode not in PLAIN_MODES:
        content = as_png(to_rgb(image))
    return {"bytes": content, "path": None}


def _file_content(path: Any, folder: Path | None, accepted: str) -> bytes:
    """Reads an image that the data names by a path, if that lies inside the data's folder."""
    if not isinstance(path, str) or not path or folder is None:
        raise _Fault("image", "it has no content", accepted)
    try:
        file = (folder / path).resolve()
        if not file.is_relative_to(folder.resolve()):
            raise _Fault("image", f"{path!r} lies outside {folder}", accepted)
        return file.read_bytes()
    except FileNotFoundError as error:
        raise _Fault("image", f"{folder / path} is missing", accepted) from error
    except (OSError, ValueError) as error:
        raise _Fault("image", f"{path!r} cannot be read ({error})", accepted) from error


def _shown(value: Any) -> str:
    """Returns a value as a message shows it, on one line and cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

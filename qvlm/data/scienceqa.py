"""ScienceQA as a `datasets.Dataset`: the schema of the hub's data set, and where rows come from.

Rows are generated (the miniature), or come from the hub, from a folder of the hub's parquet files,
or from a folder as the authors of ScienceQA publish it. Whatever the source, the columns are those
of `derek-thomas/ScienceQA`, and a data set is checked before a model is asked anything: a missing
column or a picture that does not decode is the user's to mend, and is named.
"""

import json
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DatasetsError
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from qvlm.data import miniature
from qvlm.errors import UserError

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "question": datasets.Value("string"),
        "choices": datasets.List(datasets.Value("string")),
        "answer": datasets.Value("int8"),
        "hint": datasets.Value("string"),
        "task": datasets.Value("string"),
        "grade": datasets.Value("string"),
        "subject": datasets.Value("string"),
        "topic": datasets.Value("string"),
        "category": datasets.Value("string"),
        "skill": datasets.Value("string"),
        "lecture": datasets.Value("string"),
        "solution": datasets.Value("string"),
    }
)
# The published test split: classes by subject, and IMG for questions with a picture.
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
PUBLISHED_TEST = {"questions": 4241, "NAT": 2252, "SOC": 889, "LAN": 1100, "IMG": 2017}
OFFICIAL_FILES = ("problems.json", "pid_splits.json")
OFFICIAL_SPLITS = {"train": "train", "validation": "val", "test": "test"}

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")

MINIATURE_SIZES = {"train": 8000, "validation": 2000, "test": 4000}


def load_scienceqa(
    source: str, split: str, limit: int | None = None, seed: int = 0
) -> datasets.Dataset:
    """Loads a split of ScienceQA problems.

    Args:
        source: "miniature" for the generated problems; a folder that holds `{split}.parquet` or
            `{split}-*.parquet` (also under `data/`, as the hub lays it out), or problems.json,
            pid_splits.json and `images/{split}/{id}/image.png`; or "owner/name" on the hub.
        split: "train", "validation" or "test".
        limit: the first so many problems only.
        seed: of the generator; a folder's rows are as they are.

    Raises:
        UserError: for an unknown split, a missing folder, file or column, a picture that does not
            decode, or a limit that is negative or larger than the split.
    """
    if split not in MINIATURE_SIZES:
        raise UserError(f"data.split: {split!r} is unknown; accepted are train, validation, test")
    if source == "miniature":
        data = _generated(split, seed)
    elif all((Path(source) / file).is_file() for file in OFFICIAL_FILES):
        data = _official(Path(source), split)
    elif not Path(source).is_dir() and _REPOSITORY.fullmatch(source):
        data = _hub(source, split)
    else:
        data = _parquet(Path(source), split)
    if limit is not None:
        if not 0 < limit <= len(data):
            raise UserError(
                f"evaluation.limit: {limit} is not accepted; split {split} of {source} has "
                f"{len(data)} problems"
            )
        data = data.select(range(limit))
    return data


def validate(data: datasets.Dataset, name: str) -> None:
    """Checks columns and answers, and decodes every picture once.

    Raises:
        UserError: naming the column or row that is wrong.
    """
    missing = [column for column in FEATURES if column not in data.column_names]
    if missing:
        raise UserError(
            f"{name}: column {missing[0]!r} is missing; needed are {', '.join(FEATURES)}"
        )
    answers = zip(data["answer"], data["choices"], strict=True)
    for row, (answer, choices) in enumerate(answers):
        if not 0 <= answer < len(choices):
            raise UserError(
                f"{name}: row {row} has answer {answer} but {len(choices)} choices; "
                f"accepted are 0 to {len(choices) - 1}"
            )
    for row in range(len(data)):
        try:
            data[row]["image"]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{name}: the image of row {row} does not decode: {error}") from error


def require_published(data: datasets.Dataset, source: str) -> None:
    """Holds a test split to the class sizes of the published one.

    Raises:
        UserError: with the class whose size differs.
    """
    pictures = data.cast_column("image", datasets.Image(decode=False))["image"]
    found = Counter(SUBJECTS.get(subject, subject) for subject in data["subject"])
    found |= Counter(questions=len(data), IMG=sum(image is not None for image in pictures))
    for label, size in PUBLISHED_TEST.items():
        if found[label] != size:
            raise UserError(
                f"data.source: {source} has {found[label]} {label} in its test split, but the "
                f"published ScienceQA {size}; give the whole data set, or data.published=false"
            )


@lru_cache(maxsize=4)
def _generated(split: str, seed: int) -> datasets.Dataset:
    problems = miniature.generate(split, MINIATURE_SIZES[split], seed)
    return datasets.Dataset.from_list(problems, features=FEATURES)


def _parquet(folder: Path, split: str) -> datasets.Dataset:
    if not folder.is_dir():
        raise UserError(
            f"data.source: {folder} is not a folder; accepted are miniature or a folder with "
            f"{split}.parquet or {' and '.join(OFFICIAL_FILES)}, or owner/name on the hub"
        )
    files = sorted({*folder.rglob(f"{split}.parquet"), *folder.rglob(f"{split}-*.parquet")})
    if not files:
        raise UserError(f"data.source: {folder} has no {split}.parquet or {split}-*.parquet")
    name = f"data.source: {folder} ({split})"
    try:
        data = datasets.Dataset.from_parquet([str(file) for file in files])
    except (OSError, ValueError, DatasetGenerationError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{name} cannot be read: {reason}") from error
    assert isinstance(data, datasets.Dataset)
    return _checked(data, name)


def _official(folder: Path, split: str) -> datasets.Dataset:
    """Reads the layout of ScienceQA's authors, problems in the order of pid_splits.json."""
    name = f"data.source: {folder} ({split})"
    problems, splits = (_json(folder / file) for file in OFFICIAL_FILES)
    part = OFFICIAL_SPLITS[split]
    if part not in splits:
        raise UserError(f"{name}: pid_splits.json has no {part}; it has {', '.join(splits)}")
    rows = []
    for identifier in splits[part]:
        if identifier not in problems:
            raise UserError(f"{name}: problems.json lacks problem {identifier} of pid_splits.json")
        problem = problems[identifier]
        missing = [column for column in FEATURES if column not in problem]
        if missing:
            raise UserError(
                f"{name}: problem {identifier} lacks {missing[0]!r}; needed are "
                f"{', '.join(FEATURES)}"
            )
        row = {column: problem[column] for column in FEATURES}
        if problem["image"] is not None:
            file = folder / "images" / part / identifier / problem["image"]
            if not file.is_file():
                raise UserError(f"{name}: {file} is missing, the image of problem {identifier}")
            row["image"] = {"path": str(file), "bytes": None}
        rows.append(row)
    try:
        data = datasets.Dataset.from_list(rows, features=FEATURES)
    except (ValueError, TypeError) as error:
        raise UserError(f"{name} does not fit ScienceQA's columns: {error}") from error
    return _checked(data, name)


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"data.source: {file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"data.source: {file} is no JSON object; download it again")
    return content


def _hub(source: str, split: str) -> datasets.Dataset:
    """Loads a data set of the hub; from the local cache where the hub cannot be reached."""
    name = f"data.source: {source} ({split})"
    try:
        data = datasets.load_dataset(source, split=split)
    except DatasetNotFoundError as error:
        raise UserError(
            f"{name} is not on the hub, or gated; mend the name, log in with `hf auth login`, or "
            "give data.source=FOLDER with a copy"
        ) from error
    except (OSError, ValueError, DatasetsError, HfHubHTTPError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(
            f"{name} cannot be downloaded ({reason}); try again, or give data.source=FOLDER with "
            "a copy"
        ) from error
    return _checked(data, name)


def _checked(data: datasets.Dataset, name: str) -> datasets.Dataset:
    """The columns of `FEATURES`, in their types, and every row valid."""
    missing = [column for column in FEATURES if column not in data.column_names]
    if not missing:
        try:
            data = data.select_columns(list(FEATURES)).cast(FEATURES)
        except (ValueError, TypeError, DatasetsError) as error:
            raise UserError(f"{name} does not fit ScienceQA's columns: {error}") from error
    validate(data, name)
    return data

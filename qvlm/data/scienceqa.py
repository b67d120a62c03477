"""ScienceQA as a `datasets.Dataset`: the schema of the hub's data set, and where rows come from.

Whatever the source, the columns are those of `derek-thomas/ScienceQA`, and a data set is checked
before a model is asked anything: a missing column or a picture that does not decode is the user's
to mend, and is named.
"""

from functools import lru_cache
from pathlib import Path

import datasets
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
MINIATURE_SIZES = {"train": 8000, "validation": 2000, "test": 4000}


def load_scienceqa(
    source: str, split: str, limit: int | None = None, seed: int = 0
) -> datasets.Dataset:
    """Loads a split of ScienceQA problems.

    Args:
        source: "miniature" for the generated problems, or a folder that holds `{split}.parquet` or
            `{split}-*.parquet` (also under `data/`, as the hub lays it out).
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


@lru_cache(maxsize=4)
def _generated(split: str, seed: int) -> datasets.Dataset:
    problems = miniature.generate(split, MINIATURE_SIZES[split], seed)
    return datasets.Dataset.from_list(problems, features=FEATURES)


def _parquet(folder: Path, split: str) -> datasets.Dataset:
    if not folder.is_dir():
        raise UserError(
            f"data.source: {folder} is not a folder; accepted are miniature or a folder with "
            f"{split}.parquet"
        )
    files = sorted({*folder.rglob(f"{split}.parquet"), *folder.rglob(f"{split}-*.parquet")})
    if not files:
        raise UserError(f"data.source: {folder} has no {split}.parquet or {split}-*.parquet")
    name = f"data.source: {folder} ({split})"
    try:
        data = datasets.Dataset.from_parquet([str(file) for file in files])
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{name} cannot be read: {reason}") from error
    assert isinstance(data, datasets.Dataset)
    missing = [column for column in FEATURES if column not in data.column_names]
    if not missing:
        try:
            data = data.select_columns(list(FEATURES)).cast(FEATURES)
        except (ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"{name} does not fit ScienceQA's columns: {error}") from error
    validate(data, name)
    return data

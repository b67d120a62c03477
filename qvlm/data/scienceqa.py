"""ScienceQA's problems as a `datasets.Dataset`: the published sizes, and the way to the rows.

Rows are generated (the miniature), or read from one of the formats in `qvlm.data.sources`. Whatever
the source, the columns are `FEATURES`, and rows are checked before they are used.
"""

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import datasets

from qvlm.data import miniature
from qvlm.data.sizes import MINIATURE_SIZES, PUBLISHED_CLASSES, PUBLISHED_QUESTIONS, SUBJECTS
from qvlm.data.sources import (
    OFFICIAL_FILES,
    OFFICIAL_SPLITS,
    Split,
    hub_split,
    is_repository,
    official_split,
    parquet_files,
    parquet_split,
    saved_split,
)
from qvlm.data.validation import COLUMNS, FEATURES
from qvlm.errors import UserError

__all__ = [
    "COLUMNS",
    "FEATURES",
    "OFFICIAL_FILES",
    "OFFICIAL_SPLITS",
    "load_scienceqa",
    "open_scienceqa",
    "require_published",
]


def load_scienceqa(
    source: str, split: str, limit: int | None = None, seed: int = 0, with_images: bool = True
) -> datasets.Dataset:
    """Loads a split of ScienceQA, checked, with the columns of `FEATURES`.

    A process that loads the same rows again, as the cells of a sweep do, gets them from memory.

    Args:
        source: "miniature" for generated problems, a folder in one of the formats of
            `qvlm.data.sources`, or "owner/name" on the hub.
        split: "train", "validation" or "test", and of generated problems also "claims".
        limit: Number of problems to load, from the first; None loads all.
        seed: Seed of the generator. The rows of other sources do not depend on it.
        with_images: Whether problems with an image are among them.

    Raises:
        UserError: If the source cannot be read, one of the loaded rows has a fault, or the limit is
            not positive or larger than the split.
    """
    rows = open_scienceqa(source, split, seed)
    wanted = [row for row, image in enumerate(rows.has_image) if with_images or not image]
    if not wanted:
        raise UserError(
            f"data.source: split {split} of {source} holds no problems"
            f"{'' if with_images else ' without an image'}. Give data with at least one."
        )
    if limit is not None and not 0 < limit <= len(wanted):
        raise UserError(
            f"evaluation.limit: {limit} is not a number of problems that split {split} of {source} "
            f"has{'' if with_images else ' without an image'}. Give 1 to {len(wanted)}."
        )
    return rows.take(wanted[:limit])


def open_scienceqa(source: str, split: str, seed: int = 0) -> Split:
    """Opens a split of ScienceQA without checking its rows: see `Split.take`.

    Args:
        source, split, seed: Arguments of `load_scienceqa`.

    Raises:
        UserError: If the source cannot be read.
    """
    if split not in MINIATURE_SIZES:
        raise UserError(
            f"data.split: {split!r} is not known. Choose one of: {', '.join(MINIATURE_SIZES)}."
        )
    return _open(source, split, seed, _state(source, split))


@lru_cache(maxsize=4)
def _open(source: str, split: str, seed: int, state: tuple[object, ...]) -> Split:
    """Opens a split; `state` changes with the files, so that changed files are read again."""
    if source == "miniature":
        return _generated(split, seed)
    folder = Path(source)
    if all((folder / file).is_file() for file in OFFICIAL_FILES):
        return official_split(folder, split)
    if (folder / split / "state.json").is_file():
        return saved_split(folder, split)
    if folder.is_dir():
        return parquet_split(folder, split)
    if is_repository(source):
        return hub_split(source, split)
    raise UserError(
        f"data.source: {source} is not a folder. Give miniature, a folder with {split}.parquet or "
        f"{' and '.join(OFFICIAL_FILES)}, or owner/name on the hub."
    )


def _state(source: str, split: str) -> tuple[object, ...]:
    """Returns the names, sizes and times of the files that a split is read from."""
    folder = Path(source)
    if source == "miniature" or not folder.is_dir():
        return ()
    named = [folder / file for file in OFFICIAL_FILES]
    files: Iterator[Path] | list[Path] = [*parquet_files(folder, split), *named]
    files = [*files, *(folder / split).glob("*")]
    states = ((file, file.stat()) for file in files if file.is_file())
    return tuple((str(file), state.st_size, state.st_mtime_ns) for file, state in states)


def _generated(split: str, seed: int) -> Split:
    problems = datasets.Dataset.from_list(
        miniature.generate(split, MINIATURE_SIZES[split], seed), features=COLUMNS
    ).cast_column("image", datasets.Image(decode=False))
    has_image = problems.data["image"].is_valid().to_pylist()
    return Split(
        split,
        lambda indices: problems.select(indices).to_list(),
        has_image,
        lambda index: f"miniature, row {index}",
        None,
    )


def require_published(data: datasets.Dataset, source: str) -> None:
    """Checks that a test split has the class sizes of the published one.

    Raises:
        UserError: If the size of a class differs.
    """
    images = data.cast_column("image", datasets.Image(decode=False))["image"]
    found = Counter(SUBJECTS.get(subject, subject) for subject in data["subject"])
    found |= Counter(questions=len(data), IMG=sum(image is not None for image in images))
    for label, size in {"questions": PUBLISHED_QUESTIONS, **PUBLISHED_CLASSES}.items():
        if found[label] != size:
            raise UserError(
                f"data.source: {source} has {found[label]} {label} in its test split, but the "
                f"published ScienceQA has {size}. Give the whole data set, or data.published=false."
            )

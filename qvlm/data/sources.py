"""The formats that ScienceQA comes in, each read into a `Split` of rows that nobody has checked.

- A folder of the hub's parquet files, `{split}.parquet` or `{split}-*.parquet`.
- A folder that `datasets` saved, `{split}/state.json` with Arrow files.
- A folder as the authors of ScienceQA publish it: problems.json, pid_splits.json and
  `images/{split}/{id}/image.png`.
- A repository of the hub, in the first format.

A split is checked where it is taken from: `Split.take` validates the rows that are used, and no
others.
"""

import bisect
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from datasets.fingerprint import generate_random_fingerprint
from datasets.table import table_cast
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from qvlm.data.validation import COLUMNS, require_columns, validated
from qvlm.errors import UserError

OFFICIAL_FILES = ("problems.json", "pid_splits.json")
OFFICIAL_SPLITS = {"train": "train", "validation": "val", "test": "test"}
_SHARD = re.compile(r"(?P<stem>.*-)(?P<index>\d{5})-of-(?P<count>\d{5})(?P<rest>.*)\.parquet")


class Split:
    """A split of a source: rows that have been read and not checked.

    Args:
        name: Name of the split, "train", "validation" or "test".
        read: Function that returns the rows at some indices, with undecoded images.
        has_image: Whether each row has an image, [rows].
        where: Function that names the file and row of an index, for messages.
        folder: Folder that image paths may not leave; None where images have no paths.
        official_ids: The authors' id of each row, [rows]; None where the source has none.
    """

    def __init__(
        self,
        name: str,
        read: Callable[[Sequence[int]], list[dict[str, Any]]],
        has_image: Sequence[bool],
        where: Callable[[int], str],
        folder: Path | None,
        official_ids: Sequence[str] | None = None,
    ) -> None:
        self.name = name
        self.has_image = has_image
        self._read = read
        self._where = where
        self._folder = folder
        self._official_ids = official_ids
        self._taken: dict[tuple[int, ...], datasets.Dataset] = {}

    def __len__(self) -> int:
        return len(self.has_image)

    def take(self, indices: Sequence[int]) -> datasets.Dataset:
        """Returns rows as a data set that has been checked; the second time, the same one.

        Args:
            indices: Indices of the rows.

        Raises:
            UserError: If one of these rows has a fault.
        """
        key = tuple(indices)
        if key not in self._taken:
            rows = [
                {
                    **{column: row[column] for column in COLUMNS},
                    "question_id": f"{self.name}-{index}",
                    "official_id": self._official_ids and self._official_ids[index],
                }
                for index, row in zip(key, self._read(key), strict=True)
            ]
            where = lambda position: self._where(key[position])  # noqa: E731
            self._taken[key] = validated(rows, where, self._folder)
        return self._taken[key]


def parquet_split(folder: Path, split: str) -> Split:
    """Reads the parquet files of a split.

    Raises:
        UserError: If there are none, one is damaged, missing by its own name or a copy of others,
            or a column is missing.
    """
    files = parquet_files(folder, split)
    if not files:
        raise UserError(
            f"data.source: {folder} has no {split}.parquet or {split}-*.parquet. Give a folder "
            "that holds them."
        )
    _require_all_shards(files)
    name = f"data.source: {folder} ({split})"
    try:
        sizes = [pyarrow.parquet.read_metadata(file).num_rows for file in files]
        data = _read_parquet(files)
    except (OSError, ValueError, TypeError, pyarrow.ArrowException) as error:
        raise UserError(f"{name} cannot be read: {_reason(error)}") from error
    if len(files) > 1:
        _refuse_copies(data, files, sizes)
    return table_split(data, split, name, _rows_of(files, sizes), folder)


def _read_parquet(files: Sequence[Path]) -> datasets.Dataset:
    """Reads files into memory, with the features of the first.

    `datasets.Dataset.from_parquet` would cache them by path and time, and return old rows where a
    file was replaced by one of the same time.
    """
    schema = pyarrow.parquet.read_schema(files[0])
    features = datasets.Features.from_arrow_schema(schema).arrow_schema
    tables = (pyarrow.parquet.ParquetFile(file, memory_map=True).read() for file in files)
    table = pyarrow.concat_tables(table_cast(table, features) for table in tables)
    # A fingerprint of the content would take several copies of it in memory.
    return datasets.Dataset(table, fingerprint=generate_random_fingerprint())


def parquet_files(folder: Path, split: str) -> list[Path]:
    """Returns the parquet files of a split, sorted, wherever they lie in a folder."""
    return sorted({*folder.rglob(f"{split}.parquet"), *folder.rglob(f"{split}-*.parquet")})


def saved_split(folder: Path, split: str) -> Split:
    """Reads a split that `datasets` saved with `save_to_disk`.

    Raises:
        UserError: If a file is missing or damaged, or a column is missing.
    """
    saved = folder / split
    name = f"data.source: {saved}"
    try:
        files = [entry["filename"] for entry in _json(saved / "state.json")["_data_files"]]
        outside = [file for file in files if Path(file).name != file]
        if outside:
            raise UserError(f"{name}: state.json names {outside[0]!r}, which is not in the folder.")
        data = datasets.Dataset.load_from_disk(str(saved))
    except (OSError, ValueError, TypeError, KeyError, DatasetsError) as error:
        raise UserError(f"{name} cannot be read: {_reason(error)}") from error
    return table_split(data, split, name, lambda index: f"{name}, row {index}", folder)


def official_split(folder: Path, split: str) -> Split:
    """Reads the layout of ScienceQA's authors, problems in the order of pid_splits.json.

    Raises:
        UserError: If a file is missing or damaged, or a problem or a column is missing.
    """
    name = f"data.source: {folder} ({split})"
    problems, splits = (_json(folder / file) for file in OFFICIAL_FILES)
    part = OFFICIAL_SPLITS[split]
    if part not in splits:
        raise UserError(
            f"{name}: pid_splits.json has no split {part}, only {', '.join(splits)}. "
            "Download it again."
        )
    ids = splits[part]
    if not isinstance(ids, list) or not all(isinstance(identifier, str) for identifier in ids):
        raise UserError(f"{name}: {part} in pid_splits.json is not a list of ids.")
    if len(set(ids)) < len(ids):
        twice = next(identifier for identifier in ids if ids.count(identifier) > 1)
        raise UserError(f"{name}: pid_splits.json has problem {twice} twice in {part}.")
    file = folder / OFFICIAL_FILES[0]
    for identifier in ids:
        if not isinstance(problems.get(identifier), dict):
            raise UserError(
                f"{name}: problems.json lacks problem {identifier} of pid_splits.json. "
                "Download both again."
            )
        require_columns(problems[identifier], f"data.source: {file}, problem {identifier}")

    def read(indices: Sequence[int]) -> list[dict[str, Any]]:
        rows = []
        for identifier in (ids[index] for index in indices):
            image = problems[identifier]["image"]
            if isinstance(image, str):
                image = {"bytes": None, "path": f"images/{part}/{identifier}/{image}"}
            rows.append({**problems[identifier], "image": image})
        return rows

    return Split(
        split,
        read,
        [problems[identifier]["image"] is not None for identifier in ids],
        lambda index: f"data.source: {file}, problem {ids[index]}",
        folder,
        ids,
    )


def hub_split(repository: str, split: str) -> Split:
    """Reads a data set of the hub, or its copy in the local cache.

    Raises:
        UserError: If it cannot be had, or a column is missing.
    """
    name = f"data.source: {repository} ({split})"
    try:
        data = datasets.load_dataset(repository, split=split)
    except DatasetNotFoundError as error:
        raise UserError(
            f"{name} is not on the hub, or gated. Correct the name, log in with `hf auth login`, "
            "or give data.source=FOLDER with a copy."
        ) from error
    except (OSError, ValueError, DatasetsError, HfHubHTTPError) as error:
        raise UserError(
            f"{name} cannot be downloaded ({_reason(error)}). Try again, or give "
            "data.source=FOLDER with a copy."
        ) from error
    return table_split(data, split, name, lambda index: f"{name}, row {index}", None)


def is_repository(source: str) -> bool:
    """Whether a text has the form owner/name that repositories of the hub have; a path has not."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return "/" in source


def table_split(
    data: datasets.Dataset,
    split: str,
    name: str,
    where: Callable[[int], str],
    folder: Path | None,
) -> Split:
    """Makes a split of a data set that `datasets` read.

    Args:
        data: Data set with at least the columns of `COLUMNS`.
        split: Name of the split.
        name: Name of the source in messages.
        where: Function that names the file and row of an index, for messages.
        folder: Folder that image paths may not leave; None where images have no paths.

    Raises:
        UserError: If a column is missing.
    """
    require_columns(data.column_names, name)
    data = data.select_columns(list(COLUMNS))
    if isinstance(data.features["image"], datasets.Image):
        data = data.cast_column("image", datasets.Image(decode=False))
    has_image = data.data["image"].is_valid().to_pylist()
    return Split(split, lambda indices: data.select(indices).to_list(), has_image, where, folder)


def _rows_of(files: Sequence[Path], sizes: Sequence[int]) -> Callable[[int], str]:
    """Returns a function that names the file and the row in it of an index over all files."""
    ends = list(itertools.accumulate(sizes))

    def where(index: int) -> str:
        number = bisect.bisect_right(ends, index)
        return f"data.source: {files[number]}, row {index - ends[number] + sizes[number]}"

    return where


def _require_all_shards(files: Sequence[Path]) -> None:
    """Refuses shards such as 00000-of-00002 without the others that their names announce."""
    for file in files:
        shard = _SHARD.fullmatch(file.name)
        if shard is None:
            continue
        for index in range(int(shard["count"])):
            # The rest of a name is a hash of the shard's own content.
            name = f"{shard['stem']}{index:05}-of-{shard['count']}"
            if not any(
                other.parent == file.parent and other.name.startswith(name) for other in files
            ):
                raise UserError(
                    f"data.source: {file.parent / name}.parquet is missing, which belongs to "
                    f"{file.name}. Give all {int(shard['count'])} files."
                )


def _refuse_copies(data: datasets.Dataset, files: Sequence[Path], sizes: Sequence[int]) -> None:
    """Refuses a file whose rows all stand in the other files as well."""
    fingerprints = list(_fingerprints(data))
    starts = [0, *itertools.accumulate(sizes)]
    for number, file in enumerate(files):
        own = set(fingerprints[starts[number] : starts[number + 1]])
        for other in range(number):
            rows = set(fingerprints[starts[other] : starts[other + 1]])
            if own and rows and (own <= rows or rows <= own):
                raise UserError(
                    f"data.source: {files[other]} and {file} hold the same rows. "
                    "Remove one of them."
                )


def _fingerprints(data: datasets.Dataset) -> Iterator[bytes]:
    """Returns a hash of each row's content."""
    if isinstance(data.features.get("image"), datasets.Image):
        data = data.cast_column("image", datasets.Image(decode=False))
    for row in data:
        yield hashlib.blake2b(repr(sorted(row.items())).encode(errors="replace")).digest()


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"data.source: {file} cannot be read: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"data.source: {file} is not a JSON object. Download it again.")
    return content


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    return next(iter(str(cause).splitlines()), type(cause).__name__)

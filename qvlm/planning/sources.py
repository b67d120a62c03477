"""Finds where the files of a cell are and how large they are, without fetching any."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
from datasets.naming import camelcase_to_snakecase
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from qvlm.config.schema import RunConfig
from qvlm.data.scienceqa import OFFICIAL_FILES, OFFICIAL_SPLITS
from qvlm.data.sizes import MINIATURE_SIZES, PUBLISHED_QUESTIONS
from qvlm.data.sources import is_repository
from qvlm.data.text import text_folder
from qvlm.errors import UserError
from qvlm.models.checkpoints.hub import SMALL_FILES
from qvlm.models.checkpoints.weights import INDEX_SUFFIX, STEMS
from qvlm.models.load import embedded

HUB_SECONDS = 10.0  # to wait for an answer of the hub


@dataclass(frozen=True)
class Source:
    """Files that a cell reads.

    Attributes:
        owner: What the files are, for people.
        place: Folder or repository.
        size: Bytes of all files; None if they cannot be known on this machine.
        download: Bytes that are not on this machine yet; None if unknown.
        known: Where the size is from, for people.
        cache: Folder that a download goes to, or None.
    """

    owner: str
    place: str
    size: float | None
    download: float | None
    known: str
    cache: Path | None = None


def local_copy(place: str) -> Path | None:
    """Returns the folder of a checkpoint on this machine, or None.

    That is an embedded miniature, a folder, or a snapshot in the cache of the hub.
    """
    if folder := embedded(place):
        return folder
    if Path(place).is_dir():
        return Path(place)
    cached = _cached(place, "config.json", "model")
    return cached.parent if cached else None


def checkpoint(place: str, owner: str, option: str, estimate: float | None) -> Source:
    """Finds the files of a checkpoint.

    Args:
        place: Name of an embedded miniature, folder, or repository.
        owner: What the checkpoint is, for people.
        option: Key of the configuration, for messages.
        estimate: Size in bytes if the hub does not answer, or None.

    Raises:
        UserError: If it does not exist, or would have to be downloaded offline.
    """
    folder = local_copy(place)
    if folder is not None:
        sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
        if embedded(place) or Path(place).is_dir() or _complete(folder, sizes):
            return Source(owner, place, _sum(sizes, _needed(sizes)), 0, "the disk")
    return _repository(place, owner, option, "model", _needed, estimate)


def data(config: RunConfig) -> Source:
    """Finds the files of the data set.

    Raises:
        UserError: If it does not exist, or would have to be downloaded offline.
    """
    place, owner = config.data.source, f"data {config.data.name}"
    if place == "miniature":
        return Source(owner, "generated", 0, 0, "it is made here")
    if config.on_text:
        place = str(text_folder(place))
    if Path(place).is_dir():
        files = [file for file in Path(place).rglob("*") if file.is_file()]
        return Source(owner, place, sum(file.stat().st_size for file in files), 0, "the disk")
    namespace, _, name = place.partition("/")
    prepared = datasets.config.HF_DATASETS_CACHE
    prepared = Path(prepared) / f"{namespace}___{camelcase_to_snakecase(name)}"
    if prepared.is_dir():
        size = sum(file.stat().st_size for file in prepared.rglob("*.arrow"))
        return Source(owner, place, size, 0, "the cache")
    return _repository(place, owner, "data.source", "dataset", _tables, None)


def question_count(config: RunConfig) -> int | None:
    """Returns the number of questions, or None if it is known only after reading them."""
    place, split = config.data.source, config.data.split
    if config.on_text or config.tasks.names:  # documents are read, and tasks not opened
        return None
    if config.evaluation.limit is not None:
        return config.evaluation.limit
    if place == "miniature":
        return MINIATURE_SIZES[split]
    if config.data.published and split == "test":
        return PUBLISHED_QUESTIONS
    folder = Path(place)
    try:
        if (folder / OFFICIAL_FILES[1]).is_file():
            return len(json.loads((folder / OFFICIAL_FILES[1]).read_text())[OFFICIAL_SPLITS[split]])
        files = {*folder.rglob(f"{split}.parquet"), *folder.rglob(f"{split}-*.parquet")}
        return sum(pyarrow.parquet.read_metadata(file).num_rows for file in files) or None
    except (OSError, ValueError, KeyError):  # the cell itself reports what is wrong with it
        return None


def _repository(
    place: str,
    owner: str,
    option: str,
    kind: str,
    needed: Callable[[Iterable[str]], set[str]],
    estimate: float | None,
) -> Source:
    cache = Path(constants.HF_HUB_CACHE)
    if not is_repository(place):
        raise UserError(
            f"{option}: {place} is not a folder. Choose a folder, or owner/name on the hub."
        )
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{option}: {place} is not in the local cache, and HF_HUB_OFFLINE forbids a download; "
            f"unset it, or set {option}=FOLDER to a copy"
        )
    sizes = _listing(place, option, kind)
    if sizes is None:
        known = "an estimate" if estimate else "unknown"
        return Source(owner, place, estimate, estimate, f"{known}: the hub does not answer", cache)
    files = needed(sizes)
    missing = {name for name in files if _cached(place, name, kind) is None}
    return Source(owner, place, _sum(sizes, files), _sum(sizes, missing), "the hub", cache)


def _listing(place: str, option: str, kind: str) -> dict[str, int] | None:
    """Returns the sizes of a repository's files by name, or None if the hub does not answer."""
    try:
        info: Any = HfApi().repo_info(
            place, repo_type=kind, files_metadata=True, timeout=HUB_SECONDS
        )
    except (RepositoryNotFoundError, GatedRepoError) as error:
        raise UserError(
            f"{option}: the hub has no {place} that you may read; correct the name, accept its "
            f"terms on its page and log in with `hf auth login`, or set {option}=FOLDER to a copy"
        ) from error
    except Exception:  # no network, a proxy, a hub that is down: each raises errors of its own
        return None
    return {file.rfilename: file.size or 0 for file in info.siblings}


def _needed(names: Iterable[str]) -> set[str]:
    """Returns the files that `qvlm.models.checkpoints.hub.local_folder` fetches."""
    names = set(names)
    small = {name for name in names if any(fnmatch(name, pattern) for pattern in SMALL_FILES)}
    for stem in STEMS:
        if stem + INDEX_SUFFIX in names:
            base, _, ending = stem.rpartition(".")
            return small | {name for name in names if fnmatch(name, f"{base}-*.{ending}")}
    return small | set([stem for stem in STEMS if stem in names][:1])


def _tables(names: Iterable[str]) -> set[str]:
    return {name for name in names if name.endswith(".parquet")}


def _complete(folder: Path, names: Iterable[str]) -> bool:
    """Returns whether a cached folder has all weights. An interrupted download has only some."""
    names = set(names)
    for stem in STEMS:
        if stem + INDEX_SUFFIX in names:
            placed = json.loads((folder / (stem + INDEX_SUFFIX)).read_text())["weight_map"]
            return set(placed.values()) <= names
    return any(stem in names for stem in STEMS)


def _cached(place: str, name: str, kind: str) -> Path | None:
    if not is_repository(place):
        return None
    found = try_to_load_from_cache(place, name, repo_type=kind)
    return Path(found) if isinstance(found, str) else None


def _sum(sizes: Mapping[str, int], names: Iterable[str]) -> int:
    return sum(sizes[name] for name in names)

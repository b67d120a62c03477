"""A folder for what a configuration names: a local path, or a repository of the Hugging Face hub.

Only files that hold data are fetched, never code. With `HF_HUB_OFFLINE=1` the hub's local cache is
the only source, and a mirror is simply a local path.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from qvlm.errors import UserError
from qvlm.models.checkpoints.weights import INDEX_SUFFIX, STEMS

SMALL_FILES = ("*.json", "*.model", "*.tiktoken", "merges.txt")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def local_folder(source: str | Path, option: str, weights: bool = True) -> Path:
    """The folder of a checkpoint, downloaded first if it is a repository's name.

    Args:
        source: a folder, or "owner/name" on the hub.
        option: the configuration's key, for messages.
        weights: whether the weights are needed too.

    Raises:
        UserError: if there is no such folder or repository, or it cannot be read; with the remedy.
    """
    if Path(source).is_dir():
        return Path(source)
    if not _REPOSITORY.fullmatch(str(source)):
        raise UserError(
            f"{option}: {source} is no folder; give one with a checkpoint, or owner/name on the hub"
        )
    folder = _fetch(str(source), option, SMALL_FILES)
    if not weights:
        return folder
    for index in (folder / (stem + INDEX_SUFFIX) for stem in STEMS):
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return _fetch(str(source), option, shards)
    for stem in STEMS:
        if (_fetch(str(source), option, [stem]) / stem).is_file():
            break
    return folder


def _fetch(repository: str, option: str, patterns: Sequence[str]) -> Path:
    remedy = f"or give {option}=FOLDER with a copy"
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise UserError(
            f"{option}: {repository} asks for consent; accept its terms on its page and log in "
            f"with `hf auth login`, {remedy}"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{option}: the hub has no {repository}, or it is private; mend the name, log in with "
            f"`hf auth login`, {remedy}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{option}: {repository} is not in the local cache and the hub cannot be reached; go "
            f"online without HF_HUB_OFFLINE, {remedy}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{option}: {repository} cannot be downloaded ({reason}); try again, {remedy}"
        ) from error

"""The folder of a checkpoint: a local path, or a downloaded repository of the Hugging Face hub.

Only files that hold data are downloaded, never code. With `HF_HUB_OFFLINE=1` repositories come from
the local cache alone. A mirror is a local path.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from qvlm.data.sources import is_repository
from qvlm.errors import UserError
from qvlm.models.checkpoints.weights import INDEX_SUFFIX, STEMS

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt")


def local_folder(source: str | Path, option: str, weights: bool = True) -> Path:
    """Returns the folder of a checkpoint, which is downloaded first if it is on the hub.

    Args:
        source: Folder, or "owner/name" on the hub.
        option: Key of the configuration, for messages.
        weights: Whether the weights are needed as well.

    Raises:
        UserError: If there is no such folder or repository, or it cannot be downloaded. The message
            says what to do.
    """
    if Path(source).is_dir():
        return Path(source)
    if not is_repository(str(source)):
        raise UserError(
            f"{option}: {source} is not a folder. Give a folder with a checkpoint, or owner/name "
            "on the hub."
        )
    folder = _fetch(str(source), option, SMALL_FILES)
    if not weights:
        return folder
    for index in (folder / (stem + INDEX_SUFFIX) for stem in STEMS):
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (
                OSError,
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
                RecursionError,
            ) as error:
                raise UserError(
                    f"{option}: {index} is not an index of shards ({error!r}). Remove it, and give "
                    "the command again."
                ) from error
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
            f"{option}: {repository} asks for consent. Accept its terms on its page and log in "
            f"with `hf auth login`, {remedy}."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{option}: the hub has no {repository}, or it is private. Correct the name, log in "
            f"with `hf auth login`, {remedy}."
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{option}: {repository} is not in the local cache and the hub cannot be reached. Go "
            f"online without HF_HUB_OFFLINE, {remedy}."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{option}: {repository} cannot be downloaded ({reason}). Try again, {remedy}."
        ) from error

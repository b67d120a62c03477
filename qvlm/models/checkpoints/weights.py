"""The tensors of a checkpoint folder, each read when it is asked for.

A folder holds safetensors or PyTorch's `.bin` files, as one file or as shards that an index names.
`.bin` files are pickles. They are read with `weights_only`, which builds nothing but tensors, and
are mapped into memory instead of being read as a whole.
"""

import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qvlm.errors import UserError

INDEX_SUFFIX = ".index.json"
STEMS = ("model.safetensors", "pytorch_model.bin")


class Weights(Mapping[str, Tensor]):
    """The tensors of a folder by their names in its files.

    Args:
        folder: Folder with one of the files in `STEMS`, or with an index and its shards.
        owner: Name of the checkpoint in messages, for example "model llava_13b".

    Raises:
        UserError: If there are no weights, or if a shard is missing or truncated, holds anything
            but tensors, or lacks a tensor that the index places in it.
    """

    def __init__(self, folder: Path, owner: str) -> None:
        self._owner = owner
        self._open: dict[Path, Any] = {}
        self._files: dict[str, Path] = {}
        names = [name for stem in STEMS for name in (stem + INDEX_SUFFIX, stem)]
        found = next((folder / name for name in names if (folder / name).is_file()), None)
        if found is None:
            raise UserError(f"{owner}: {folder} has no weights. Give one of: {', '.join(names)}.")
        if found.name.endswith(INDEX_SUFFIX):
            self._read_index(found)
        else:
            self._files = dict.fromkeys(self._names_in(found), found)

    def __getitem__(self, name: str) -> Tensor:
        file = self._files[name]
        content = self._content(file)
        try:
            return content[name] if isinstance(content, dict) else content.get_tensor(name)
        except SafetensorError as error:
            raise self._damaged(file, error) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor without reading it."""
        content = self._content(self._files[name])
        if isinstance(content, dict):
            return tuple(content[name].shape)
        return tuple(content.get_slice(name).get_shape())

    def file(self, name: str) -> Path:
        """Returns the file that holds a tensor."""
        return self._files[name]

    def close(self) -> None:
        """Closes the files until they are read again, so that their pages leave memory.

        A tensor from here that is still referenced keeps its file open.
        """
        self._open.clear()

    def _read_index(self, index: Path) -> None:
        try:
            placed = dict(json.loads(index.read_text())["weight_map"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{self._owner}: {index} is not an index of shards ({error!r}). Download it again."
            ) from error
        shards = {shard: index.parent / Path(shard).name for shard in sorted(set(placed.values()))}
        for file in shards.values():
            if not file.is_file():
                raise UserError(
                    f"{self._owner}: shard {file} is missing, which {index.name} names. "
                    "Download it."
                )
        held = {shard: dict.fromkeys(self._names_in(file)) for shard, file in shards.items()}
        for name, shard in placed.items():
            if name not in held[shard]:
                raise UserError(
                    f"{self._owner}: {shards[shard]} lacks tensor {name}, which {index.name} "
                    "places there. Download both again."
                )
        # A shard may hold tensors that the index does not name. They count as unexpected ones.
        self._files = {name: shards[shard] for shard, names in held.items() for name in names}

    def _names_in(self, file: Path) -> list[str]:
        return list(self._content(file).keys())

    def _content(self, file: Path) -> Any:
        """Returns a dict of tensors that are mapped into memory, or an open safetensors file."""
        if file not in self._open:
            try:
                if file.suffix == ".safetensors":
                    self._open[file] = safe_open(file, framework="pt")
                else:
                    self._open[file] = _read_bin(file)
            except pickle.UnpicklingError as error:
                raise UserError(
                    f"{self._owner}: {file} is not read, because it holds other things than "
                    "tensors or is damaged. Give a file of tensors."
                ) from error
            except (SafetensorError, OSError, EOFError, RuntimeError, ValueError) as error:
                raise self._damaged(file, error) from error
        return self._open[file]

    def _damaged(self, file: Path, error: Exception) -> UserError:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return UserError(
            f"{self._owner}: {file} is truncated or damaged ({reason}). Download it again."
        )


def _read_bin(file: Path) -> dict[str, Tensor]:
    # Files from before PyTorch 1.6 are not zip archives and cannot be mapped.
    with file.open("rb") as opened:
        mapped = opened.read(4) == b"PK\x03\x04"
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise pickle.UnpicklingError("not a dictionary of tensors")
    return content

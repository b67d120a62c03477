"""Answers kept on disk while an evaluation runs, so that one that was killed goes on where it was.

A file per batch, written beside its place and renamed: it is there whole or not at all. A batch is
kept or asked again as a whole, so that every batch of a resumed evaluation holds the questions that
it would have held, and the answers are those of an evaluation that nobody disturbed.

What may share a folder is the caller's affair: one model, one configuration, one kind of machine.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from qvlm.errors import RunError
from qvlm.records.files import explained, write_file


class KeptAnswers:
    """The answers in a folder, which is made when there is something to keep.

    Attributes:
        resumed: how many answers were found rather than given.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.resumed = 0

    def find(self, batch: int, prompts: Sequence[str]) -> list[str] | None:
        """The answers of a batch, by its number; None if it was not kept for these prompts."""
        try:
            content = json.loads(self._file(batch).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if content["prompts"] != _checksum(prompts):
            return None
        self.resumed += len(prompts)
        return list(content["answers"])

    def keep(self, batch: int, prompts: Sequence[str], answers: Sequence[str]) -> None:
        """Writes the answers of a batch.

        Raises:
            RunError: if the disk does not take them.
        """
        content = {"prompts": _checksum(prompts), "answers": list(answers)}
        with explained(f"answers: {self.folder}", RunError):
            write_file(self._file(batch), json.dumps(content))

    def _file(self, batch: int) -> Path:
        return self.folder / f"{batch}.json"


def _checksum(prompts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(prompts).encode()).hexdigest()

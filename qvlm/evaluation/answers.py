"""Answers on disk while an evaluation runs, so that a killed evaluation continues where it was.

Each batch has a file of its own, which is written under a temporary name and renamed: it is whole
or absent. A batch is either reused or asked again as a whole. A resumed evaluation therefore pads
the same questions together and gives the same answers as an undisturbed one.

The caller decides which evaluations share a folder: one model, one configuration, one kind of
machine.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qvlm.errors import RunError
from qvlm.records.files import explained, write_file


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    Attributes:
        text: Decoded text without special tokens.
        cut: Whether generation stopped at the limit of new tokens instead of at an end token.
    """

    text: str
    cut: bool = False


class KeptAnswers:
    """The answers in a folder, which is created for the first batch.

    Attributes:
        resumed: Number of answers that were found on disk.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.resumed = 0

    def find(self, batch: int, prompts: Sequence[str]) -> list[Answer] | None:
        """Returns the answers of a batch, or None if none were kept for exactly these prompts."""
        try:
            content = json.loads(self._file(batch).read_text(encoding="utf-8"))
            if content["prompts"] != _checksum(prompts):
                return None
            answers = [Answer(str(text), bool(cut)) for text, cut in content["answers"]]
        except (OSError, ValueError, KeyError, TypeError):  # absent, damaged, or of another version
            return None
        if len(answers) != len(prompts):
            return None
        self.resumed += len(prompts)
        return answers

    def keep(self, batch: int, prompts: Sequence[str], answers: Sequence[Answer]) -> None:
        """Writes the answers of a batch.

        Raises:
            RunError: if the file cannot be written.
        """
        content = {"prompts": _checksum(prompts), "answers": [[a.text, a.cut] for a in answers]}
        with explained(f"answers: {self.folder}", RunError):
            write_file(self._file(batch), json.dumps(content))

    def _file(self, batch: int) -> Path:
        return self.folder / f"{batch}.json"


def _checksum(prompts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(prompts).encode()).hexdigest()

"""Plain text as data: documents in three splits, from a folder or from the package.

A document is a file `*.txt` in UTF-8. A folder either has a subfolder for each split, or its files
are dealt to the splits by a hash of their names, so that a file stays in its split when others are
added. The texts of the package are in `qvlm/data/texts`, and its README names their sources.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from qvlm.errors import UserError

EMBEDDED = Path(__file__).parent / "texts"
NAME = "text"  # the source that stands for the texts of the package
SPLITS = ("train", "validation", "test")
# Of ten files without subfolders of splits, how many go to each split.
_SHARES = {"train": 3, "validation": 2, "test": 5}


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        name: Name of its file without the ending.
        text: Its content, not empty.
    """

    name: str
    text: str


def text_folder(source: str) -> Path:
    """Returns the folder of a source of texts: "text" for those of the package, or a folder.

    Raises:
        UserError: If it is not a folder.
    """
    folder = EMBEDDED if source == NAME else Path(source)
    if not folder.is_dir():
        raise UserError(
            f"data.source: {source} is not a folder. Give text, or a folder with files *.txt."
        )
    return folder


def load_documents(source: str, split: str, limit: int | None = None) -> list[Document]:
    """Loads the documents of a split, sorted by name.

    Args:
        source: See `text_folder`.
        split: "train", "validation" or "test".
        limit: Number of documents, from the first; None loads all.

    Raises:
        UserError: If the split has no document, the limit is larger than the split, or a file is
            empty or is not UTF-8.
    """
    if split not in SPLITS:
        raise UserError(f"data.split: {split!r} is not known. Choose one of: {', '.join(SPLITS)}.")
    folder = text_folder(source)
    files = _files_of(folder, split)
    if not files:
        raise UserError(
            f"data.source: {folder} has no text for split {split}. Give a folder with files "
            f"*.txt in {', '.join(SPLITS)}, or with more files."
        )
    if limit is not None and not 0 < limit <= len(files):
        raise UserError(
            f"evaluation.limit: {limit} is not a number of documents that split {split} of "
            f"{source} has. Give 1 to {len(files)}."
        )
    return [_read(file) for file in files[:limit]]


def _files_of(folder: Path, split: str) -> list[Path]:
    if any((folder / name).is_dir() for name in SPLITS):
        return sorted((folder / split).glob("*.txt"))
    return [file for file in sorted(folder.glob("*.txt")) if _split_of(file.name) == split]


def _split_of(name: str) -> str:
    digit = int(hashlib.sha256(name.encode()).hexdigest(), 16) % sum(_SHARES.values())
    for split, share in _SHARES.items():
        if digit < share:
            return split
        digit -= share
    raise AssertionError("the shares cover every digit")


def _read(file: Path) -> Document:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise UserError(f"data.source: {file} cannot be read as UTF-8: {error}.") from error
    if not text.strip():
        raise UserError(f"data.source: {file} is empty. Remove it.")
    return Document(file.stem, text)

"""`qvlm.json` of a packed checkpoint: how it was quantized, and how it encodes texts and images.

Anybody may have written the file, so it is data and nothing else. `read_origin` accepts one version
of one schema, with the types that `Origin` declares. It resolves no interpolation and imports no
class: the method of a packed model is a name and the parameters that were recorded. What the file
says about bits is compared with the codes (`qvlm.packing.verification.refutation`).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qvlm.errors import UserError
from qvlm.records.files import write_file
from qvlm.records.strict import build, read_json
from qvlm.validation import one_of

# File that says how the model was quantized. It is not part of config.json, since loading the
# weights does not need it.
ORIGIN = "qvlm.json"
VERSION = 2


@dataclass(frozen=True)
class Encoding:
    """How texts and images are encoded.

    Attributes:
        image_fit: How an image becomes square, "crop" or "pad".
        image_text: Text that stands for an image in a prompt.
        begins_with_bos: Whether texts begin with the bos token.
    """

    image_fit: str
    image_text: str
    begins_with_bos: bool

    def __post_init__(self) -> None:
        one_of("image_fit", self.image_fit, ("crop", "pad"))


@dataclass(frozen=True)
class Origin:
    """Content of `qvlm.json`.

    Attributes:
        version: Version of the schema.
        hash: Hash of the cell that quantized the model.
        method: Name of the method in tables.
        options: Options that the checkpoint settles, by config group; see
            `qvlm.cell.settled.Settled`.
        expected: Full names of the layers that must be packed.
        calibration_ids: Rows of the calibration problems in their split.
        uncalibrated: Full names of the layers that no calibration problem reached.
        report: What the method reported, the fields of a `MethodReport`.
        files: Names of the other files of the checkpoint. Another save may replace these.
        encoding: How texts and images are encoded.
    """

    version: int
    hash: str
    method: str
    options: dict[str, Any]
    expected: list[str]
    calibration_ids: list[int]
    uncalibrated: list[str]
    report: dict[str, Any]
    files: list[str]
    encoding: Encoding


def write_origin(folder: str | Path, origin: Origin) -> None:
    """Writes how a packed checkpoint was quantized.

    This is written last, so a folder with the file holds a complete checkpoint.

    Raises:
        OSError: If the file cannot be written.
    """
    write_file(Path(folder) / ORIGIN, json.dumps(asdict(origin), indent=2, allow_nan=False) + "\n")


def read_origin(folder: str | Path) -> Origin:
    """Reads how a packed checkpoint was quantized.

    Raises:
        UserError: If the folder has no file of this kind, or its content is not exactly an `Origin`
            of this version.
    """
    try:
        content = read_json(Path(folder) / ORIGIN)
    except (OSError, ValueError) as error:
        raise _unusable(folder, f"has no readable {ORIGIN} ({error})") from error
    try:
        if isinstance(content, dict) and content.get("version") != VERSION:
            raise ValueError(f"it is not of version {VERSION}")
        for text in _texts(content):
            if "${" in text:
                raise ValueError(f"{text!r} is an interpolation, and none is resolved")
            if "\0" in text:
                raise ValueError(f"{text!r} holds a NUL")
        origin = build(Origin, content)
        if not (origin.method.isprintable() and 0 < len(origin.method) <= 100):
            raise ValueError("method is not a name of up to 100 printable characters")
    except (ValueError, UserError) as error:
        raise _unusable(folder, f"has a {ORIGIN} that cannot be used: {error}") from error
    return origin


def _unusable(folder: str | Path, reason: str) -> UserError:
    sentence = " ".join(f"model.packed: {folder} {reason}".split()).rstrip(".")
    return UserError(f"{sentence}. Give a folder that python run.py save_packed=FOLDER wrote.")


def _texts(value: Any) -> Iterator[str]:
    """Yields every text and key in a value of JSON."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            waiting += value

"""Records: one folder per cell, with everything that was measured and what it was measured with.

    results/runs/<model>-<method>-<bits>-<hash>/
        config.yaml          composed configuration
        run.json             identity, versions, revision, hardware, stages, calibration, report
        metrics.json         per class: n, accuracy, interval, unparsable; or measures of text; or
                             results of tasks
        predictions.parquet  one row per problem, document of a text, or sample of a task
        bits.json            per quantized layer: levels counted and levels allowed

The hash covers what a number depends on: the part of the configuration that `influences` keeps, the
code version and the weights. A folder is written under a hidden name, synced and renamed, so a
folder that exists is complete even if its writer was killed. `run.json` holds the checksums of the
other files, so later damage is noticed. Tables read records and nothing else.
"""

import errno
import hashlib
import io
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pyarrow import ArrowException

from qvlm.bits import BitWidths
from qvlm.errors import RunError, UserError
from qvlm.records.files import PARTIAL, explained, temporaries, write_folder

ANSWERS = ".answers"
ABANDONED_SECONDS = 600.0  # writing a record takes well under a second
FORGOTTEN_SECONDS = 30 * 86_400.0  # a cell that was killed that long ago is not resumed

_CHECKED = ("bits.json", "config.yaml", "metrics.json", "predictions.parquet")
# What every record has, and tables rely on.
_RUN = {
    **dict.fromkeys(("hash", "model", "method", "method_name", "finished"), str),
    **dict.fromkeys(("influences", "stages", "report", "versions", "git", "hardware"), dict),
    "exceeding": list,
}
# What reading files that anybody may have written can raise.
_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, RecursionError),
    *(yaml.YAMLError, ArrowException, UserError),
)
# What every record has in its metrics, and the columns of its predictions, by its kind.
_METRICS = {
    "problems": ("classes", "Avg"),
    "text": ("text", "perplexity"),
    "tasks": ("tasks", "results"),
}
_COLUMNS = {
    "problems": ("question_id", "has_image", "answer", "prediction", "correct", "text"),
    "text": ("document", "tokens", "nll"),
    "tasks": ("task", "doc_id", "filter", "requests", "responses", "target", "metrics"),
}


@dataclass(frozen=True)
class Record:
    """A complete cell, read from its folder.

    Attributes:
        path: Folder of the record.
        config: Content of `config.yaml`.
        run: Content of `run.json`.
        metrics: Content of `metrics.json`.
        predictions: Content of `predictions.parquet`.
        layers: Content of `bits.json`: one mapping per quantized layer with the keys layer, w_bits,
            a_bits, weight_levels and input_levels.
    """

    path: Path
    config: dict[str, Any]
    run: dict[str, Any]
    metrics: dict[str, Any]
    predictions: pd.DataFrame
    layers: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.name

    @property
    def model(self) -> str:
        """Name of the model in the configuration."""
        return str(self.run["model"])

    @property
    def method(self) -> str:
        """Name of the method as tables print it."""
        return str(self.run["method"])

    @property
    def bits(self) -> str:
        """Bit widths as tables print them: "FP", "W4A4", ..."""
        return self.bit_widths.label

    @property
    def bit_widths(self) -> BitWidths:
        """Bits per weight and per activation."""
        return BitWidths(**self.run["influences"]["bits"])

    @property
    def kind(self) -> str:
        """What the model was evaluated on: "problems", plain "text", or "tasks" of lm-eval."""
        parts = self.metrics if isinstance(self.metrics, dict) else {}
        return next((kind for kind in ("text", "tasks") if kind in parts), "problems")

    @classmethod
    def load(cls, path: str | Path) -> "Record":
        """Reads a record.

        Raises:
            RunError: If a file is missing, cannot be read, or is not what the run wrote.
        """
        path = Path(path)
        remedy = f"remove {path} and run the cell again"
        try:
            run = read_run(path)
            content = {name: (path / name).read_bytes() for name in _CHECKED}
            for name, data in content.items():
                if _checksum(data) != run["files"].get(name):
                    raise RunError(f"{path / name} is not what the run wrote; {remedy}")
            record = cls(
                path=path,
                config=yaml.safe_load(content["config.yaml"]),
                run=run,
                metrics=json.loads(content["metrics.json"]),
                predictions=pd.read_parquet(io.BytesIO(content["predictions.parquet"])),
                layers=json.loads(content["bits.json"]),
            )
            record._check()
        except _UNREADABLE as error:
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise RunError(f"{path} is not a complete record ({reason}); {remedy}") from error
        return record

    def _check(self) -> None:
        """Makes sure that the parts have the form in which records are written.

        Raises:
            ValueError: Naming the part that has not.
        """
        for key, kind in _RUN.items():
            if not isinstance(self.run.get(key), kind):
                raise ValueError(f"run.json: {key} is not of the kind {kind.__name__}")
        BitWidths(**self.run["influences"]["bits"])
        for key in ("search_seconds", "candidates"):
            if key not in self.run["report"]:
                raise ValueError(f"run.json: report has no {key}")
        metrics = self.metrics if isinstance(self.metrics, dict) else {}
        part, entry = _METRICS[self.kind]
        found = metrics.get(part)
        if not isinstance(found, dict) or not isinstance(found.get(entry), dict):
            raise ValueError(f"metrics.json: {part} has no {entry}")
        if not isinstance(self.config, dict):
            raise ValueError("config.yaml is not a mapping")
        if not isinstance(self.layers, list) or not all(isinstance(x, dict) for x in self.layers):
            raise ValueError("bits.json is not a list of mappings")
        if missing := [name for name in _COLUMNS[self.kind] if name not in self.predictions]:
            raise ValueError(f"predictions.parquet has no column {missing[0]}")


def read_run(path: Path) -> dict[str, Any]:
    """Reads only the `run.json` of a record, without comparing checksums.

    Raises:
        OSError, ValueError, RecursionError: If it cannot be read or does not have the form of one.
    """
    run = json.loads((path / "run.json").read_text(encoding="utf-8"))
    if not isinstance(run, dict) or not isinstance(run.get("files"), dict):
        raise ValueError("run.json is not a mapping with checksums of files")
    return run


def find_record(path: Path, identity: str) -> tuple[Record | None, str]:
    """Looks for the record of a cell.

    Args:
        path: Folder that the record has.
        identity: Hash of the cell.

    Returns:
        The complete record, or None; and why a folder that exists is not that record, or "".
    """
    if not path.exists():
        return None, ""
    try:
        record = Record.load(path)
    except RunError as error:
        return None, str(error)
    if record.run["hash"] != identity:
        return None, f"{path} is the record of another cell"
    return record, ""


def find_records(runs_dir: str | Path, kind: str = "problems") -> list[Record]:
    """Returns the records of a folder that are of one kind, sorted by name.

    Args:
        runs_dir: Folder of records.
        kind: What they were evaluated on; see `Record.kind`.

    Raises:
        RunError: If one of them is damaged.
    """
    runs = Path(runs_dir)
    if not runs.is_dir():
        return []
    folders = (path for path in runs.iterdir() if path.is_dir() and path.name[0] != ".")
    records = [Record.load(path) for path in sorted(folders)]
    return [record for record in records if record.kind == kind]


def identify(influences: Mapping[str, Any], code: str, weights: Mapping[str, str]) -> str:
    """Returns the hash of what a cell's numbers depend on (64 hexadecimal digits).

    Args:
        influences: Part of the configuration that influences numbers.
        code: Code version.
        weights: Content hashes of the files that the configuration points at.
    """
    whole = {"config": influences, "code": code, "weights": dict(weights)}
    return _checksum(json.dumps(whole, sort_keys=True, allow_nan=False).encode())


def require_writable(folder: Path, option: str = "results_dir") -> None:
    """Makes sure that a folder can be made and written, and leaves nothing behind.

    Args:
        folder: Folder, which need not exist.
        option: Key of the configuration that names it, for the message.

    Raises:
        UserError: If it cannot, because of a file or a dangling link in its place, a loop of links,
            a name that is too long, or missing permission.
    """
    try:
        with explained(
            f"{option}: {folder}", UserError, "choose a folder that can be made and written"
        ):
            present = Path(os.path.abspath(folder))
            with suppress(FileNotFoundError):  # other errors say that its files cannot exist
                os.lstat(present / ("x" * 100))
            while not os.path.lexists(present):
                present = present.parent
            if not present.exists():
                raise OSError(errno.ENOENT, f"{present} is a link to nothing")
            with tempfile.TemporaryFile(dir=present):
                pass
    except ValueError as error:  # a NUL
        raise UserError(f"{option}: {str(folder)!r} is not a path ({error})") from error


def write_record(
    path: Path,
    config: Mapping[str, Any],
    run: Mapping[str, Any],
    metrics: Mapping[str, Any],
    predictions: pd.DataFrame,
    layers: list[dict[str, Any]],
) -> Record:
    """Writes a record as a whole and replaces one of the same name.

    What a process that was killed while it wrote this record has left is removed: whoever writes a
    record holds its lock.

    Args:
        path: Folder of the record.
        config, run, metrics, predictions, layers: Parts of the record; see `Record`.

    Raises:
        RunError: If it cannot be written. Then the record that was there before is unchanged.
    """
    remove_leftovers(path.parent)
    for leftover in temporaries(path):
        shutil.rmtree(leftover, ignore_errors=True)

    def fill(folder: Path) -> None:
        predictions.to_parquet(folder / "predictions.parquet")
        (folder / "config.yaml").write_text(yaml.safe_dump(plain(config), sort_keys=False))
        (folder / "metrics.json").write_text(_json(metrics))
        (folder / "bits.json").write_text(_json(layers))
        checksums = {file.name: _checksum(file.read_bytes()) for file in sorted(folder.iterdir())}
        (folder / "run.json").write_text(_json({**run, "files": checksums}))

    with explained(f"record {path}", RunError):
        write_folder(path, fill)
    return Record.load(path)


def remove_leftovers(runs: Path) -> None:
    """Removes what killed runs left: hidden files and folders that are old enough."""
    if not runs.is_dir():
        return
    for suffix, seconds in ((PARTIAL, ABANDONED_SECONDS), (ANSWERS, FORGOTTEN_SECONDS)):
        for path in runs.glob(f".*{suffix}"):
            with suppress(FileNotFoundError):  # another process has just removed it
                if time.time() - path.lstat().st_mtime <= seconds:
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


def answers_folder(path: Path, identity: str, place: Mapping[str, str]) -> Path:
    """Returns the hidden folder in which a cell keeps its answers until its record is written.

    Args:
        path: Folder of the record.
        identity: Hash of the cell.
        place: What else must be equal for answers to be put together: device and versions.
    """
    return path.with_name(f".{path.name}.{identify({}, identity, place)[:16]}{ANSWERS}")


def plain(value: Any) -> Any:
    """Converts a value to types of JSON and YAML. A number that is not finite becomes None.

    Raises:
        TypeError: If it holds anything but mappings, sequences, sets, text, numbers and paths.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [plain(inner) for inner in items]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy, torch
        return plain(value.tolist())
    raise TypeError(f"a record cannot hold {type(value).__name__}")


def _json(value: Any) -> str:
    return json.dumps(plain(value), indent=1, allow_nan=False) + "\n"


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

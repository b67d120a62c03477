"""One folder per cell: everything that was measured and everything it was measured with.

    results/runs/<model>-<method>-<bits>-<hash>/
        config.yaml          the composed configuration
        run.json             identity, versions, revision, hardware, stages, calibration, report
        metrics.json         per class: n, accuracy, interval, unparsable
        predictions.parquet  per question
        bits.json            per quantized layer: levels counted against levels allowed

The hash names what a number depends on: the part of the configuration that `config.influences`
keeps, the code version, the weights. A folder is written under a hidden name, flushed to disk and
renamed, so a folder that is there is complete whenever the writer was killed; `run.json` holds the
checksums of the other files, so one that was damaged later is noticed. Tables read records and
nothing else.
"""

import hashlib
import json
import math
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

from qvlm.bits import BitWidths
from qvlm.errors import RunError, UserError
from qvlm.records.files import PARTIAL, explained, write_folder

ANSWERS = ".answers"
ABANDONED_SECONDS = 600.0  # writing takes well under a second
FORGOTTEN_SECONDS = 30 * 86_400.0  # nobody resumes a cell that was killed that long ago


@dataclass(frozen=True)
class Record:
    """A complete cell, read from its folder.

    Attributes:
        path: the folder.
        config: `config.yaml`.
        run: `run.json`.
        metrics: `metrics.json`.
        predictions: `predictions.parquet`.
        layers: `bits.json`: layer, w_bits, a_bits, weight_levels, input_levels.
    """

    path: Path
    config: dict[str, Any]
    run: dict[str, Any]
    metrics: dict[str, Any]
    predictions: pd.DataFrame
    layers: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def model(self) -> str:
        """The model's name in the configuration."""
        return self.run["model"]

    @property
    def method(self) -> str:
        """The method's name as tables print it."""
        return self.run["method"]

    @property
    def bits(self) -> str:
        """The label of the bit widths: "FP", "W4A4", ..."""
        return self.bit_widths.label

    @property
    def bit_widths(self) -> BitWidths:
        """Bits per weight and per activation."""
        return BitWidths(**self.run["influences"]["bits"])

    @classmethod
    def load(cls, path: str | Path) -> "Record":
        """Reads a folder.

        Raises:
            RunError: if a file is missing, cannot be read or is not what was written.
        """
        path = Path(path)
        try:
            run = json.loads((path / "run.json").read_text())
            content = {name: (path / name).read_bytes() for name in run["files"]}
            for name, data in content.items():
                if _checksum(data) != run["files"][name]:
                    raise RunError(f"{path / name} is not what the run wrote; {_remedy(path)}")
            return cls(
                path=path,
                config=yaml.safe_load(content["config.yaml"]),
                run=run,
                metrics=json.loads(content["metrics.json"]),
                predictions=pd.read_parquet(path / "predictions.parquet"),
                layers=json.loads(content["bits.json"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunError(f"{path} is no complete record ({reason}); {_remedy(path)}") from error


def find_record(path: Path, identity: str) -> tuple[Record | None, str]:
    """The complete record of a cell, or why there is none ("" if it was never computed)."""
    if not path.exists():
        return None, ""
    try:
        record = Record.load(path)
    except RunError as error:
        return None, str(error)
    if record.run.get("hash") != identity:
        return None, f"{path} is the record of another cell"
    return record, ""


def find_records(runs_dir: str | Path) -> list[Record]:
    """Every record of a folder, by name.

    Raises:
        RunError: if one of them is damaged.
    """
    runs = Path(runs_dir)
    if not runs.is_dir():
        return []
    folders = (path for path in runs.iterdir() if path.is_dir() and path.name[0] != ".")
    return [Record.load(path) for path in sorted(folders)]


def identify(influences: Mapping[str, Any], code: str, weights: Mapping[str, str]) -> str:
    """The hash of what a cell's numbers depend on (64 hexadecimal digits).

    Args:
        influences: `config.influences` of the cell.
        code: the code version.
        weights: content hashes of the files that the configuration points at.
    """
    whole = {"config": influences, "code": code, "weights": dict(weights)}
    return _checksum(json.dumps(whole, sort_keys=True, allow_nan=False).encode())


def require_writable(folder: Path) -> None:
    """Makes sure that a folder can be made and written, and leaves nothing behind.

    Raises:
        UserError: if it cannot.
    """
    present = folder.absolute()
    while not present.exists():
        present = present.parent
    try:
        with tempfile.TemporaryFile(dir=present):
            return
    except OSError as error:
        raise UserError(
            f"results_dir: {folder} cannot be written ({error.strerror}); "
            "give a folder that can be made and written"
        ) from error


def write_record(
    path: Path,
    config: Mapping[str, Any],
    run: Mapping[str, Any],
    metrics: Mapping[str, Any],
    predictions: pd.DataFrame,
    layers: list[dict[str, Any]],
) -> Record:
    """Writes a record so that it is there whole or not at all; replaces one of the same name.

    Raises:
        RunError: if the disk does not take it.
    """
    remove_leftovers(path.parent)

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
    """Removes what killed runs left: hidden folders that nobody has written to for long."""
    if not runs.is_dir():
        return
    for suffix, seconds in ((PARTIAL, ABANDONED_SECONDS), (ANSWERS, FORGOTTEN_SECONDS)):
        for path in runs.glob(f".*{suffix}"):
            with suppress(FileNotFoundError):  # another process has just removed it
                if time.time() - path.stat().st_mtime > seconds:
                    shutil.rmtree(path, ignore_errors=True)


def answers_folder(path: Path, identity: str, place: Mapping[str, str]) -> Path:
    """Where a cell keeps its answers until its record is written: beside the record, hidden.

    Args:
        path: the folder of the record.
        identity: the cell's hash.
        place: what else the answers must have in common to be put together: device, versions.
    """
    return path.with_name(f".{path.name}.{identify({}, identity, place)[:16]}{ANSWERS}")


def plain(value: Any) -> Any:
    """The same value in the types that JSON and YAML know; a number that is not finite is None.

    Raises:
        TypeError: for anything else than mappings, sequences, strings, numbers and paths.
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


def _remedy(path: Path) -> str:
    return f"remove {path} and run the cell again"

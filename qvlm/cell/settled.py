"""The options that a packed checkpoint settles, as its `qvlm.json` states them.

A stranger may have written the file. What it says becomes typed values, and nothing is imported,
built or resolved: the model is packed already, so its method is a name with parameters to record.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qvlm.bits import BitWidths
from qvlm.config.schema import (
    FULL_PRECISION_METHOD,
    CalibrationConfig,
    ModelConfig,
    QuantizerConfig,
    RunConfig,
    canonical,
)
from qvlm.errors import UserError
from qvlm.packing import ORIGIN, read_origin
from qvlm.records.strict import build
from qvlm.validation import check_name, plain_parameters, shown

_IMPORT_PATH = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)+")


@dataclass(frozen=True)
class Settled:
    """The options that a packed checkpoint settles, by config group; see `RunConfig`."""

    model: ModelConfig
    method: dict[str, Any]
    method_name: str
    bits: BitWidths
    quantizer: QuantizerConfig
    calibration: CalibrationConfig

    @classmethod
    def of(cls, config: RunConfig) -> "Settled":
        """The options of a cell that packs a model."""
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})


def read_settled(folder: str | Path) -> Settled:
    """Reads what a packed checkpoint settles.

    Raises:
        UserError: if its `qvlm.json` cannot be used.
    """
    origin = read_origin(folder)
    try:
        settled = build(Settled, origin.options, "options")
        check_name("options.model.name", settled.model.name)
        check_name("options.method_name", settled.method_name)
        if settled.model.stands_for is not None:
            check_name("options.model.stands_for", settled.model.stands_for)
        target = settled.method.get("_target_")
        if not isinstance(target, str) or not _IMPORT_PATH.fullmatch(target):
            raise ValueError("options.method._target_ is not an import path")
        plain_parameters("options.method", settled.method)
        if settled.bits.is_full_precision or settled.method == FULL_PRECISION_METHOD:
            raise ValueError("options name full precision, which is never packed")
    except (ValueError, UserError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"model.packed: {folder} has a {ORIGIN} that cannot be used: {reason}. Give a folder "
            "that python run.py save_packed=FOLDER wrote."
        ) from error
    return settled


def settle(config: RunConfig) -> RunConfig:
    """Puts what a packed checkpoint settles in place of the options of a cell.

    Args:
        config: Configuration with `model.packed`.

    Raises:
        UserError: if the checkpoint cannot be used.
    """
    settled = read_settled(str(config.model.packed))
    return canonical(
        replace(
            config,
            model=replace(settled.model, packed=config.model.packed),
            method=settled.method,
            method_name=settled.method_name,
            bits=settled.bits,
            quantizer=settled.quantizer,
            calibration=settled.calibration,
            execution="packed",
            stream=False,
        )
    )


def require_agreement(config: RunConfig, overrides: Sequence[str]) -> None:
    """Refuses options that contradict a packed checkpoint, which would be ignored.

    Args:
        config: Configuration with `model.packed`, before the checkpoint settles any option.
        overrides: Words of the command line. Defaults may differ from the checkpoint.

    Raises:
        UserError: if an override gives an option another value than the checkpoint has.
    """
    settled = asdict(read_settled(str(config.model.packed)))
    given = asdict(config)
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~").partition("@")[0]
        path = key.split(".")
        if path[0] not in settled or key == "model.packed":
            continue
        if key == "model":
            path = ["model", "name"]
        elif key == "method":  # its parameters may have been given beside it
            path = ["method_name"]
            if given["method"] == settled["method"]:
                continue
        found = _look_up(settled, path)
        if found != _look_up(given, path):
            raise UserError(
                f"{override} is not how {config.model.packed} was made, which has "
                f"{'.'.join(path)}={_written(path, found)}. Leave it out, or pack the model again."
            )


def _look_up(options: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = options
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _written(path: Sequence[str], value: Any) -> str:
    return BitWidths(**value).label.lower() if list(path) == ["bits"] else shown(value)

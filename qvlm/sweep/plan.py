"""Turns the combinations of a sweep into cells: each once, full precision first, all checked."""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from qvlm.config.compose import from_hydra
from qvlm.config.explain import explained
from qvlm.config.schema import RunConfig, canonical
from qvlm.errors import UserError
from qvlm.sweep.launch import build
from qvlm.sweep.local import Here
from qvlm.validation import LONGEST_NAME

if TYPE_CHECKING:  # importing it imports PyTorch
    from qvlm.cell.identity import Cell

    Planned = tuple[list[str], Cell]


def plan(
    combinations: Sequence[list[str]], compose: Callable[[list[str]], DictConfig]
) -> "Iterator[list[Planned]]":
    """Yields the batches of a sweep. Every cell is checked and identified before the first batch.

    With `preflight` there are no batches: the page is printed, and nothing runs.

    Args:
        combinations: Overrides of each cell.
        compose: Function that composes the configuration of overrides, Hydra's part included.

    Returns:
        Batches of cells, each with its overrides.

    Raises:
        UserError: if any cell is wrong.
    """
    configs = [
        (replace(config, group=sweep_name(combinations)), overrides)
        if config.group == RunConfig.group
        else (config, overrides)
        for config, overrides in _distinct(combinations, compose)
    ]
    launchers = [config.launcher for config, _ in configs]
    if any(launcher != launchers[0] for launcher in launchers):
        raise UserError("launcher is not a single value. A sweep has one launcher.")
    with explained():
        launcher = build(launchers[0])
    if other_ranks() and not isinstance(launcher, Here):
        raise UserError(
            "launcher is not possible under accelerate launch, whose ranks it would not use. Leave "
            "out one of the two."
        )
    if any(config.preflight for config, _ in configs):
        from qvlm.planning.preflight import preflight

        preflight([config for config, _ in configs])
        return

    from qvlm.cell.identity import Cell

    folders = [config.save_packed for config, _ in configs if config.save_packed is not None]
    if len(set(folders)) < len(folders):
        raise UserError(
            "save_packed is not one folder for several cells. Give each cell a folder of its own."
        )
    cells = [(overrides, Cell.of(config)) for config, overrides in configs]
    cells = [planned for planned in cells if not _is_committed(planned[1])]
    if left_out := len(configs) - len(cells):
        print(f"{left_out} of {len(configs)} cells are left out: their answers are committed")
    for first in (True, False):
        if batch := [planned for planned in cells if planned[1].config.full_precision is first]:
            yield batch


def _is_committed(cell: "Cell") -> bool:
    """Whether the answers of a cell are among those of its option `committed`."""
    from qvlm.records.cells import cell_of, cells_in

    folder = cell.config.committed
    return folder is not None and cell_of(cell.identity) in cells_in(Path(folder))


def sweep_name(combinations: Sequence[Sequence[str]]) -> str:
    """Names a sweep after what it sweeps over, such as "method-awq-qvlm_bits-w4a4".

    Args:
        combinations: Overrides of each cell.

    Returns:
        A name that `group` accepts. It has the options that take several values, and the model,
        method and bits where they are given. A single cell is "cells".
    """
    if len(combinations) < 2:
        return RunConfig.group
    values: dict[str, list[str]] = {}
    for key, _, value in (override.partition("=") for one in combinations for override in one):
        values.setdefault(key.lstrip("+"), []).append(value)
    named = {key: [*dict.fromkeys(given)] for key, given in values.items()}
    parts = [
        "-".join([key, *given])
        for key, given in named.items()
        if len(given) > 1 or key in ("model", "method", "bits")
    ]
    name = re.sub(r"[^A-Za-z0-9._]+", "-", "_".join(parts)).strip("-.")[:LONGEST_NAME]
    return name or RunConfig.group


def other_ranks() -> int:
    """The number of processes that accelerate's launcher started beside this one."""
    return int(os.environ.get("WORLD_SIZE", 1)) - 1 if "LOCAL_RANK" in os.environ else 0


def _distinct(
    combinations: Sequence[list[str]], compose: Callable[[list[str]], DictConfig]
) -> list[tuple[RunConfig, list[str]]]:
    """The configurations that differ in more than what full precision ignores."""
    found: dict[str, tuple[RunConfig, list[str]]] = {}
    for combination in combinations:
        with explained(combination):
            composed = compose(combination)
        HydraConfig.instance().set_config(composed)
        with explained():
            config = from_hydra(composed)
        if config.model.packed is not None:
            from qvlm.cell.settled import require_agreement

            require_agreement(config, combination)
        config = canonical(config)
        whole = asdict(config)
        if config.full_precision:
            del whole["quantizer"], whole["calibration"]
        found.setdefault(json.dumps(whole, sort_keys=True), (config, combination))
    return list(found.values())

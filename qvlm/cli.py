"""The command line: Hydra composes, this module checks what Hydra lets through and speaks plainly.

What a person gets wrong is answered by one sentence on stderr that names the option and what it
accepts, exit code 2; what breaks on the way by one sentence and exit code 1. `HYDRA_FULL_ERROR=1`
adds the traceback. A defect of ours is no sentence: it keeps its traceback.

Hydra reports errors and exits by itself unless `HYDRA_FULL_ERROR` is set, so it is set while Hydra
runs. PyTorch and the rest are imported when a cell is about to run, so that `--help` and a mistyped
option are answered at once.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from tqdm import tqdm

from qvlm.config.schema import CONF, RunConfig, canonical, from_hydra, register
from qvlm.errors import RunError, UserError
from qvlm.records.locks import Held, Watch
from qvlm.sweep.launchers import LATER, Here, build

FULL_ERROR = "HYDRA_FULL_ERROR"
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; see `qvlm.processes` if it was launched."""
    if not _helpers():
        return _main(arguments)
    from qvlm.runtime import workers

    if not workers.init():
        return workers.worker_loop()
    code = _main(arguments)
    if code != INTERRUPTED:  # which the others were, too
        workers.shutdown()
    return code


def _helpers() -> int:
    """How many processes accelerate's launcher started beside this one."""
    return int(os.environ.get("WORLD_SIZE", 1)) - 1 if "LOCAL_RANK" in os.environ else 0


def _main(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    full_error = os.environ.get(FULL_ERROR) == "1"
    recorded: list[Path] = []
    try:
        _run(given, recorded)
    except KeyboardInterrupt:
        # Cells that a parallel launcher ran are not known here; they have said so themselves.
        done = f"{len(recorded)} cells are recorded" if recorded else "what was recorded stays"
        print(
            f"interrupted: {done}; give the same command to go on: recorded cells are reused, one "
            "that was being evaluated keeps its answers, one that was streamed its layers",
            file=sys.stderr,
        )
        return INTERRUPTED
    except SystemExit as done:  # --help, --version
        return done.code if isinstance(done.code, int) else 0
    except Exception as error:
        failures = list(error.exceptions) if isinstance(error, ExceptionGroup) else [error]
        _report(failures, full_error)
        return 2 if all(isinstance(failure, UserError) for failure in failures) else 1
    return 0


def _report(failures: Sequence[Exception], full_error: bool) -> None:
    for failure in failures:
        if full_error or not isinstance(failure, UserError | RunError):
            traceback.print_exception(failure)
    expected = (failure for failure in failures if isinstance(failure, UserError | RunError))
    for sentence in dict.fromkeys(" ".join(str(failure).split()) for failure in expected):
        print(f"error: {sentence}", file=sys.stderr)


def _run(arguments: list[str], recorded: list[Path]) -> None:
    """Hands the arguments to Hydra; raises what went wrong. Fills `recorded` cell by cell."""
    parser = get_args_parser()
    parser.error = _refuse
    options: argparse.Namespace = parser.parse_args(arguments)
    if options.config_dir is not None:
        sys.path.append(os.path.abspath(options.config_dir))  # a method beside its YAML
    register()
    failures: list[Exception] = []

    def cell(composed: DictConfig) -> Path | Exception:
        """One job; its failure is its value, because Hydra prints about those that raise."""
        try:
            config = _typed(composed)
            if config.preflight:
                from qvlm.planning.preflight import preflight

                preflight([config])
                return Path(config.results_dir)
            alone = HydraConfig.get().mode is RunMode.RUN
            recorded.append(_run_alone(config) if alone else _run_in_turn(config))
            return recorded[-1]
        except Held as held:  # the sweep comes back to it
            return held
        except Exception as error:
            failures.append(error)
            return error

    decorated = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(cell)
    with _hydra_environment(arguments):
        try:
            decorated()
        except Exception as error:
            if not _refused_by_hydra(error):
                raise
            raise UserError(explain(error, arguments)) from error
    if failures:
        raise failures[0]


def _run_alone(config: RunConfig) -> Path:
    """The one cell of a command; waits for whoever computes it."""
    if not isinstance(build(config.launcher), Here):
        raise UserError("launcher: it runs the cells of a sweep; add -m, or leave it out")
    from qvlm.cell.pipeline import run_cell

    watch = Watch()
    while True:
        try:
            return run_cell(config)
        except Held as held:
            tqdm.write(f"{held}; waiting for it")
            watch.wait([held.record])


def _run_in_turn(config: RunConfig) -> Path:
    """A cell of a sweep in this process."""
    from qvlm.cell.pipeline import run_cell

    try:
        return run_cell(config)
    except Held as held:
        tqdm.write(f"{held}; {LATER}")
        raise


def plan(
    combinations: Sequence[list[str]], compose: Callable[[list[str]], DictConfig]
) -> Iterator[list[list[str]]]:
    """The batches of a sweep: its distinct cells, full precision first, all of them checked.

    With `preflight` there are none: what they would take has then been said.

    Args:
        combinations: the overrides of each cell.
        compose: the configuration, Hydra's part included, that overrides make.

    Raises:
        UserError: if any cell is wrong, before the first batch.
    """
    cells: dict[str, tuple[RunConfig, list[str]]] = {}
    for combination in combinations:
        try:
            composed = compose(combination)
        except Exception as error:
            if not _refused_by_hydra(error):
                raise
            raise UserError(explain(error, combination)) from error
        HydraConfig.instance().set_config(composed)
        config = canonical(_typed(composed))
        whole = asdict(config)
        if config.full_precision:
            del whole["quantizer"], whole["calibration"]
        cells.setdefault(json.dumps(whole, sort_keys=True), (config, combination))

    launchers = [config.launcher for config, _ in cells.values()]
    if any(launcher != launchers[0] for launcher in launchers):
        raise UserError("launcher: a sweep has one; give a single value")
    try:
        launcher = build(launchers[0])
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    if not isinstance(launcher, Here) and _helpers():
        raise UserError(
            "launcher: its processes would not be those of accelerate launch; leave one of them out"
        )

    if any(config.preflight for config, _ in cells.values()):
        from qvlm.planning.preflight import preflight

        preflight([config for config, _ in cells.values()])
        return

    from qvlm.cell import inputs as prepare

    saved = [config.save_packed for config, _ in cells.values() if config.save_packed is not None]
    if len(set(saved)) < len(saved):
        raise UserError("save_packed: each cell of a sweep needs a folder of its own")
    for config, _ in cells.values():
        prepare.check(prepare.adopt(config))
    for first in (True, False):
        if batch := [job for config, job in cells.values() if config.full_precision is first]:
            yield batch


def _typed(composed: DictConfig) -> RunConfig:
    try:
        return from_hydra(composed)
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error


def _refused_by_hydra(error: Exception) -> bool:
    """Whether Hydra says that the input is wrong; some of its refusals are a plain ValueError."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    origin = frames[-1].f_globals["__name__"].partition(".")[0]
    refusal = isinstance(error, HydraException | OmegaConfBaseException)
    return refusal or (isinstance(error, ValueError) and origin == "hydra")


def explain(error: BaseException, overrides: Sequence[str] = ()) -> str:
    """One sentence for what Hydra or OmegaConf refused in `overrides`."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    message = str(error).strip()
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if group and error.options is not None:
            return f"unknown option {group}={option}; accepted are {', '.join(error.options)}"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}; write overrides as key=value"
    if message.startswith("Ambiguous value for argument"):
        override = message.splitlines()[0].split("'")[1]
        return f"{override} gives several values; add -m to run all of them"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        key = cause.full_key or cause.key
        parent = cause.parent_node
        accepted = set(map(str, parent)) if isinstance(parent, DictConfig) else set()
        return f"unknown key {key}; accepted are {', '.join(sorted(accepted - {'hydra'}))}"
    if isinstance(cause, OmegaConfBaseException):
        reason = str(cause.msg or cause).splitlines()[0]
        return f"{cause.full_key}: {reason}" if cause.full_key else reason
    return f"{' '.join(message.split())}, in: {' '.join(overrides)}"


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}; see python run.py --help")


@contextmanager
def _hydra_environment(arguments: list[str]) -> Iterator[None]:
    """Lets Hydra read `arguments` and raise instead of print."""
    argv, before = sys.argv, os.environ.get(FULL_ERROR)
    sys.argv = [argv[0], *arguments]
    os.environ[FULL_ERROR] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if before is None:
            del os.environ[FULL_ERROR]
        else:
            os.environ[FULL_ERROR] = before

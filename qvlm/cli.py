"""The command line: Hydra composes the configuration, and every mistake is one sentence.

A mistake of the user is answered by one sentence on stderr that names the option and what it
accepts, with exit code 2. What breaks on the way is one sentence with exit code 1, as is what the
system refuses. Unexpected exceptions keep their traceback, and `HYDRA_FULL_ERROR=1` adds it to all
others.

Hydra reports errors and exits by itself unless `HYDRA_FULL_ERROR` is set, so it is set while Hydra
runs. PyTorch and other heavy packages are imported when a cell is about to run, so that `--help`
and a mistyped option are answered at once.
"""

import argparse
import io
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from tqdm import tqdm

import qvlm
from qvlm.command import INTERRUPTED, STARTING, busy, discard_output, is_expected, program, sentence
from qvlm.config.compose import CONF, from_hydra, register
from qvlm.config.explain import explained
from qvlm.config.schema import PATHS, RunConfig
from qvlm.errors import UserError
from qvlm.records.locks import Held, Watch
from qvlm.sweep.launch import build
from qvlm.sweep.local import Here
from qvlm.sweep.plan import other_ranks
from qvlm.validation import expanded_path

FULL_ERROR = "HYDRA_FULL_ERROR"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Under `accelerate launch` rank 0 runs it, and the other ranks serve it; see
    `qvlm.runtime.workers`.

    Args:
        arguments: Arguments of the command line, or None for those of this process.
    """
    if not other_ranks():
        return _main(arguments)
    from qvlm.runtime import workers

    if not workers.init():
        return workers.worker_loop()
    code = _main(arguments)
    if code != INTERRUPTED:  # an interrupt reaches the other ranks as well
        workers.shutdown()
    return code


def _main(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    full_error = os.environ.get(FULL_ERROR) == "1"
    try:
        try:
            _run(given)
        finally:
            sys.stdout.flush()  # what a pipe refuses shows here, and not while Python ends
    except KeyboardInterrupt:
        print(
            "interrupted: give the same command to resume. Recorded cells are reused, a cell that "
            "was being evaluated keeps its answers, and one that was streamed keeps its layers.",
            file=sys.stderr,
        )
        return INTERRUPTED
    except SystemExit as done:  # --help, --version
        return done.code if isinstance(done.code, int) else 0
    except Exception as error:
        failures = list(error.exceptions) if isinstance(error, ExceptionGroup) else [error]
        if all(isinstance(failure, BrokenPipeError) for failure in failures):
            return _output_was_closed(given)
        _report(failures, full_error)
        return 2 if all(isinstance(failure, UserError) for failure in failures) else 1
    return 0


def _output_was_closed(arguments: Sequence[str]) -> int:
    """Ends a command whose reader has gone, as `head` does: only a run has something to tell."""
    discard_output()
    if not {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i"} & {*arguments}:
        print(
            "error: the reader of the output has gone before the command was finished. Give the "
            "same command again, which reuses what is recorded.",
            file=sys.stderr,
        )
    return 1


def _report(failures: Sequence[Exception], full_error: bool) -> None:
    for failure in failures:
        if full_error or not is_expected(failure):
            traceback.print_exception(failure)
    expected = filter(is_expected, failures)
    for line in dict.fromkeys(map(sentence, expected)):
        print(f"error: {line}", file=sys.stderr)


def _run(arguments: list[str]) -> None:
    """Hands the arguments to Hydra, and raises what went wrong."""
    parser = get_args_parser()
    parser.error = _refuse
    for action in parser._actions:
        if "--version" in action.option_strings:
            action.version = f"qvlm {qvlm.__version__}"  # Hydra would say its own
    options: argparse.Namespace = parser.parse_intermixed_args(arguments)
    # Hydra reads overrides in one place only, and no "~" without quotes.
    others = [word for word in arguments if word not in options.overrides]
    arguments = [*map(_quote_home, options.overrides), *others]
    if options.config_dir is not None:
        folder = expanded_path("--config-dir", options.config_dir)
        sys.path.append(os.path.abspath(folder))  # a method beside its YAML
    register()
    failures: list[Exception] = []

    def task(composed: DictConfig) -> Path | Exception:
        """What Hydra calls for each cell that a launcher of ours does not run.

        A failure is returned, because Hydra prints about jobs that raise.
        """
        try:
            with explained():
                config = from_hydra(composed)
            if config.model.packed is not None:
                from qvlm.cell.settled import require_agreement

                require_agreement(config, HydraConfig.get().overrides.task)
            if config.preflight:
                from qvlm.planning.preflight import preflight

                preflight([config])
                return Path(config.results_dir)
            return _run_one(config, wait=HydraConfig.get().mode is RunMode.RUN)
        except Held as held:  # the sweep returns to it
            return held
        except Exception as error:
            failures.append(error)
            return error

    decorated = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)
    with _hydra_environment(arguments), explained(arguments), _shown_part(options.package):
        decorated()
    if failures:
        raise failures[0]


def _quote_home(override: str) -> str:
    """Quotes the value of an override such as `results_dir=~/results`."""
    key, equals, value = override.partition("=")
    plain = key.lstrip("+") in PATHS and value.startswith("~") and not set(value) & set("\"',\\")
    return f'{key}="{value}"' if equals and plain else override


@contextmanager
def _shown_part(package: str | None) -> Iterator[None]:
    """Says in our words that `--cfg` finds no such part, which Hydra prints before it exits."""
    said = io.StringIO()
    try:
        with redirect_stderr(said) if package else nullcontext():
            yield
    except SystemExit as ended:
        if ended.code == 1 and package:
            raise UserError(
                f"--package={package} is not a part of the configuration. Choose a group of "
                "options such as model, or leave it out."
            ) from ended
        raise


def _run_one(config: RunConfig, wait: bool) -> Path:
    """Runs a cell in this process.

    Args:
        config: Configuration of the cell.
        wait: Whether the cell is the only one of the command. It then waits if another process
            computes it; a cell of a sweep raises `Held`.
    """
    with explained():
        launcher = build(config.launcher)
    if wait and not isinstance(launcher, Here):
        raise UserError(
            "launcher is not for a single cell, but for a sweep. Add -m, or leave out launcher."
        )
    with busy(STARTING):
        from qvlm.cell.identity import Cell
        from qvlm.cell.pipeline import run_cell
        from qvlm.summary import print_summary

        cell, watch = Cell.of(config), Watch()
    while True:
        try:
            left = run_cell(cell)
            if wait:
                print_summary([left])
            return left
        except Held as held:
            if not wait:
                raise
            tqdm.write(f"{held}; waiting for it")
            watch.wait([held.record])


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}; see {program()} --help")


@contextmanager
def _hydra_environment(arguments: list[str]) -> Iterator[None]:
    """Lets Hydra read `arguments`, and raise errors instead of printing them."""
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

"""Weights & Biases: one run per cell, and one run per table with the table as its artifact.

The run of a cell begins with its evaluation, so that a long one can be watched, and ends with its
record. Tracking cannot cost a result: whatever goes wrong is one warning, after which the cell goes
on without it. `tracking=offline` is the default. It needs no account and makes no network call;
`wandb sync` uploads the folders later. `tracking=online` becomes offline if there is no API key or
no connection.

W&B is imported only where it is used, so never with `tracking=off`. It collects nothing by itself
(no console, no system metrics, no code, no host name): hardware, revision and timings come from the
record. Its working files go below `tracking.dir` instead of the home folder, unless the environment
variables of W&B say otherwise. What a run shows is in `qvlm.records.tracked`.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import pandas as pd
from tqdm import tqdm

from qvlm.config.schema import TrackingConfig
from qvlm.records import tracked
from qvlm.records.record import Record, plain

if TYPE_CHECKING:
    import datasets

CONNECT_SECONDS = 30
UPLOAD_SECONDS = 120
STEPS = 50  # entries of the history of an evaluation, at most
_KEPT = (
    *("hash", "code", "git", "versions", "hardware", "device", "processes", "threads", "command"),
    *("started", "finished"),
)


class Tracker:
    """The W&B run of a cell, as a context manager around its computation.

    The run has the name of the record, its command as notes, and tags for model, method and bits.
    It opens when the first answers are there, or else with the record. If the cell fails, the run
    is marked as failed.

    Args:
        tracking: Mode, project and folder, and the number of examples.
        group: Name of the sweep that the cell belongs to.
        name: Name of the record.
        tags: Model, method and bits.
        command: Command that runs the cell.
        config: Configuration of the cell.
    """

    def __init__(
        self,
        tracking: TrackingConfig,
        group: str,
        name: str,
        tags: Sequence[str] = (),
        command: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._tracking = tracking
        about = dict(name=name, group=group, job_type="cell", tags=list(tags), notes=command)
        about["config"] = plain(config or {})
        self._run = _Run(tracking, about) if tracking.mode != "off" else None
        self._logged = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._run is not None:
            self._run.close(failed=kind is not None)

    def progress(
        self, answered: int, total: int, accuracy: float, ci_low: float, ci_high: float
    ) -> None:
        """Logs how far an evaluation is, at most `STEPS` times.

        Args:
            answered: Number of questions that are answered.
            total: Number of questions.
            accuracy: Accuracy so far, in percent.
            ci_low, ci_high: Ends of its 95 % interval, in percent.
        """
        if self._run is None or not answered or answered * STEPS < self._logged * total:
            return
        self._logged = answered * STEPS // total + 1
        shown = dict(answered=answered, accuracy=accuracy, ci_low=ci_low, ci_high=ci_high)
        entry = {f"progress/{key}": value for key, value in shown.items()}
        self._run.do(lambda run: run.log(entry))

    def finish(self, record: Record, problems: "datasets.Dataset | None") -> None:
        """Logs a complete record and closes the run.

        Args:
            record: Complete record on disk.
            problems: Problems that were asked, in the order of the record's predictions; None for
                text.
        """
        if self._run is None:
            return
        about = {key: record.run.get(key) for key in _KEPT}

        def log(run: Any) -> None:
            run.config.update({"run": about})
            tracked.log_record(run, record, problems, self._tracking.examples)

        self._run.do(log)
        self._run.close()


def log_table(
    csv: Path, page: Path, tracking: TrackingConfig, group: str, records: Sequence[Record] = ()
) -> None:
    """Logs a finished table: both of its files as an artifact, and the CSV as a W&B table.

    Args:
        csv: Table in long form; the stem of its name is the name of the table.
        page: Table as a page.
        tracking: Mode, project and folder.
        group: Name of the group of cells that the table shows.
        records: Records that the table shows, for charts that compare them.
    """
    if tracking.mode == "off":
        return

    def log(run: Any) -> None:
        import wandb

        run.log({csv.stem: tracked.table(pd.read_csv(csv)), **tracked.comparison(records)})
        artifact = wandb.Artifact(csv.stem, type="table")
        for path in (csv, page):
            artifact.add_file(str(path), name=path.name)
        run.log_artifact(artifact)

    about = dict(name=f"{group}-{csv.stem}", group=group, job_type="table", tags=["table"])
    run = _Run(tracking, about)
    run.do(log)
    run.close()


class _Run:
    """A W&B run that opens when it is first used. After a failure, which is told, it does nothing.

    Args:
        tracking: Mode, project and folder.
        about: Further arguments of `wandb.init`; "name" is needed.
    """

    def __init__(self, tracking: TrackingConfig, about: Mapping[str, Any]) -> None:
        self._tracking = tracking
        self._about = about
        self._run: Any = None
        self._failed = False
        self._open = ExitStack()

    def do(self, work: Callable[[Any], None]) -> None:
        """Does something with the run. Any failure becomes a warning and ends the run."""
        if self._failed:
            return
        try:
            import wandb  # which fails where its own packages have other versions

            if self._run is None:
                self._open.enter_context(_environment(self._tracking))
                self._open.callback(wandb.teardown)  # its service process would outlive its runs
                mode: Any = self._tracking.mode
                # Without a mode W&B posts telemetry; unless it is silent it asks for an API key.
                silent = wandb.Settings(silent=True, mode=mode)
                wandb.setup(silent)
                wandb.termsetup(silent, None)  # which `setup` leaves out if W&B was set up before
                self._run = _open(self._tracking, self._about)
            work(self._run)
        except Exception as error:  # the exceptions of W&B have no common base class
            self._fail(error)

    def close(self, failed: bool = False) -> None:
        """Ends the run, if it is open.

        Args:
            failed: Whether what the run is about failed.
        """
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish(exit_code=int(failed))
        except Exception as error:
            self._fail(error)
        self._leave()

    def _leave(self) -> None:
        """Ends W&B's service, which may be gone, and restores the environment."""
        try:
            self._open.close()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if not self._failed:
            name = self._about["name"]
            _warn(f"Weights & Biases did not log {name} ({_reason(error)})")
        self._failed = True
        self.close(failed=True)
        self._leave()


def _open(tracking: TrackingConfig, about: Mapping[str, Any]) -> Any:
    import wandb

    settings = wandb.Settings(
        silent=True,
        console="off",
        host="",
        init_timeout=CONNECT_SECONDS,
        finish_timeout=UPLOAD_SECONDS,
        save_code=False,
        disable_git=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
    # W&B adds a folder named wandb to the one that it is given.
    folder = Path(tracking.dir)
    parent = folder.parent if folder.name == "wandb" else folder
    mode: Any = tracking.mode
    try:
        return wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            dir=parent,
            mode=mode,
            reinit="create_new",
            settings=settings,
            **about,
        )
    except Exception as error:
        if tracking.mode == "offline":
            raise
        _warn(
            f"tracking=online is not possible ({_reason(error)}); {about['name']} is kept offline. "
            f"Upload it later with: wandb sync {parent / 'wandb'}/offline-run-*"
        )
        return _open(replace(tracking, mode="offline"), about)


@contextmanager
def _environment(tracking: TrackingConfig) -> Iterator[None]:
    """Sets the environment variables of W&B that the user has not set, for as long as a run lasts.

    They keep W&B's staging and cache folders in `tracking.dir` and, offline, switch off the crash
    reports of its service process.
    """
    folder = Path(tracking.dir)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {"WANDB_DATA_DIR": folder / "data", "WANDB_CACHE_DIR": folder / "cache"}
    values = {name: str(path.absolute()) for name, path in wanted.items()}
    if tracking.mode == "offline":
        values["WANDB_ERROR_REPORTING"] = "false"
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def _warn(sentence: str) -> None:
    tqdm.write(f"warning: {sentence}", file=sys.stderr)

"""Where the cells of a sweep run: here, or in other processes through joblib, submitit or Ray.

A launcher is a dataclass. Its fields are the options of `launcher=NAME` (`conf/launcher`); its
`launch` yields, in any order, the position of each cell and what became of it: the folder of its
record, or the exception. A cell that fails is a value like any other, so the others go on.

Who computes which cell needs no arrangement among launchers, nor among sweeps: `qvlm.locks` sees to
it that a cell is computed by one process at a time. A worker that meets a cell of another process
gives it back as `Held`, and the sweep comes back to it; no job waits on a machine that it occupies.

Imports nothing heavy. joblib, submitit and Ray are imported when they are used.
"""

import importlib.util
import logging
import multiprocessing
import os
import shutil
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

from hydra.utils import get_object
from omegaconf import OmegaConf
from tqdm import tqdm

from qvlm.config.schema import RunConfig
from qvlm.errors import RunError, UserError
from qvlm.records.locks import Held, find_owner

Outcome = Path | Exception
POLL = {"slurm": 15.0, "local": 0.5}  # seconds between two looks for results
LATER = "going on with the others, and back to it at the end"


def attempt(config: RunConfig) -> Outcome:
    """Runs a cell; what went wrong is returned, with its traceback as a note if it is a defect."""
    from qvlm.cell.pipeline import run_cell

    try:
        return run_cell(config)
    except (UserError, RunError) as error:
        return error
    except Exception as error:
        error.add_note(traceback.format_exc())  # an exception that travels loses its traceback
        return error


@dataclass
class Cell:
    """A cell as another process runs it: in the same folder, with the same imports and arguments.

    Attributes:
        config: what it computes.
        folder: that relative paths start from.
        imports: where modules are searched for.
        arguments: the command line, for the record.
    """

    config: RunConfig
    folder: str = field(default_factory=os.getcwd)
    imports: list[str] = field(default_factory=lambda: list(sys.path))
    arguments: list[str] = field(default_factory=lambda: list(sys.argv))

    def __call__(self) -> Outcome:
        os.chdir(self.folder)
        sys.path += [path for path in self.imports if path not in sys.path]
        sys.argv = self.arguments
        return attempt(self.config)

    def checkpoint(self) -> Any:
        """What submitit queues again before a job is preempted or out of time: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class Launcher(Protocol):
    """Runs cells."""

    def launch(self, cells: Sequence[Cell]) -> Iterator[tuple[int, Outcome]]:
        """Yields the position of each cell, and what became of it, as they end."""
        ...


@dataclass
class Here:
    """One cell after the other in this process: Hydra does that by itself."""


@dataclass
class Joblib:
    """Several cells at a time, each in a process of this machine.

    Attributes:
        jobs: how many at a time. Each gets its share of the cores, and with `device=auto` a GPU of
            its own as long as there are enough.
    """

    jobs: int = 2

    def __post_init__(self) -> None:
        _at_least("jobs", self.jobs, 1)

    def launch(self, cells: Sequence[Cell]) -> Iterator[tuple[int, Outcome]]:
        """Yields the position of each cell, and what became of it, as they end.

        A worker that is killed, as one is that takes too much memory, takes the whole pool with it.
        What was not done is then tried one cell at a time, to tell which it was.
        """
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        waiting = dict(enumerate(cells))
        try:
            for index, outcome in self._run(waiting):
                del waiting[index]
                yield index, outcome
        except TerminatedWorkerError:
            tqdm.write(
                f"warning: a worker was killed; {len(waiting)} cells are tried one by one",
                file=sys.stderr,
            )
            for index, cell in waiting.items():
                try:
                    yield from self._run({index: cell})
                except TerminatedWorkerError:
                    reason = "was killed, perhaps for want of memory; fewer launcher.jobs need less"
                    yield index, RunError(f"the worker of {describe(cell.config)} {reason}")

    def _run(self, cells: Mapping[int, Cell]) -> Iterator[tuple[int, Outcome]]:
        from joblib import Parallel, delayed

        # At least two, because a single one would be this process.
        parallel = Parallel(n_jobs=max(self.jobs, 2), batch_size=1, return_as="generator_unordered")
        work = (delayed(_run_numbered)(index, cell) for index, cell in list(cells.items()))
        yield from parallel(work)


@dataclass
class Slurm:
    """A Slurm job per cell, through submitit; they are submitted as one array.

    Attributes:
        partition: null is the cluster's default.
        gpus: of a job.
        cpus: of a job.
        memory_gib: of a job.
        hours: after which a job is queued again, up to three times, and goes on in its cell.
        jobs: at most so many at a time; null leaves that to the cluster.
        sbatch: any other options of sbatch.
        cluster: "slurm", or "local" for processes of this machine.
    """

    partition: str | None = None
    gpus: int = 1
    cpus: int = 8
    memory_gib: float = 64
    hours: float = 48
    jobs: int | None = None
    sbatch: dict[str, Any] = field(default_factory=dict)
    cluster: str = "slurm"

    def __post_init__(self) -> None:
        _at_least("gpus", self.gpus, 0)
        _at_least("cpus", self.cpus, 1)
        for key, value in (("memory_gib", self.memory_gib), ("hours", self.hours)):
            if value <= 0:
                raise UserError(f"launcher.{key}: {value} is not accepted; give a number above 0")
        if self.jobs is not None:
            _at_least("jobs", self.jobs, 1)
        if self.cluster not in ("slurm", "local"):
            raise UserError(
                f"launcher.cluster: {self.cluster!r} is unknown; accepted are slurm, local"
            )
        _need("submitit", "slurm")
        if self.cluster == "slurm" and shutil.which("srun") is None:
            raise UserError(
                "launcher=slurm: there is no srun here; start it where jobs are submitted, or try "
                "launcher.cluster=local"
            )

    def launch(self, cells: Sequence[Cell]) -> Iterator[tuple[int, Outcome]]:
        """Submits all cells, and yields the position of each and what became of it, as they end.

        On an interrupt the jobs of a cluster go on, and it is said how to end them.
        """
        from submitit import AutoExecutor
        from submitit.core.utils import FailedJobError, UncompletedJobError
        from submitit.helpers import as_completed

        logs = Path(cells[0].config.results_dir) / "slurm"
        executor = AutoExecutor(logs, cluster=self.cluster)
        executor.update_parameters(**self.parameters())
        with executor.batch():
            jobs = [executor.submit(cell) for cell in cells]
        tqdm.write(f"submitted {len(jobs)} jobs; what they print is in {logs}")
        positions = {job.job_id: index for index, job in enumerate(jobs)}
        try:
            for job in as_completed(jobs, poll_frequency=POLL[self.cluster]):
                index = positions[job.job_id]
                try:
                    outcome = job.result()
                except (FailedJobError, UncompletedJobError):
                    outcome = RunError(
                        f"job {job.job_id} of {describe(cells[index].config)} ended without a "
                        f"result (state {job.state}); see {job.paths.stderr}"
                    )
                yield index, _tell(outcome)
        except BaseException:
            left = [job for job in jobs if not job.done()]
            if self.cluster == "local":
                for job in left:
                    job.cancel()
            elif left:
                arrays = sorted({job.job_id.partition("_")[0] for job in left})
                tqdm.write(
                    f"{len(left)} Slurm jobs go on; `scancel {' '.join(arrays)}` ends them",
                    file=sys.stderr,
                )
            raise

    def parameters(self) -> dict[str, Any]:
        """The same options in submitit's words."""
        given: dict[str, Any] = {
            "name": "qvlm",
            "nodes": 1,
            "tasks_per_node": 1,
            "gpus_per_node": self.gpus,
            "cpus_per_task": self.cpus,
            "mem_gb": self.memory_gib,
            "timeout_min": round(60 * self.hours),
            "slurm_additional_parameters": {"requeue": True, **self.sbatch},
        }
        if self.partition is not None:
            given["slurm_partition"] = self.partition
        if self.jobs is not None:
            given["slurm_array_parallelism"] = self.jobs
        return given


@dataclass
class Ray:
    """A Ray task per cell.

    Attributes:
        address: of a cluster, or "auto"; null starts Ray on this machine.
        gpus: of a cell; null is one where there are any.
        cpus: of a cell.
    """

    address: str | None = None
    gpus: float | None = None
    cpus: int = 1

    def __post_init__(self) -> None:
        if self.gpus is not None:
            _at_least("gpus", self.gpus, 0)
        _at_least("cpus", self.cpus, 1)
        _need("ray", "ray")

    def launch(self, cells: Sequence[Cell]) -> Iterator[tuple[int, Outcome]]:
        """Yields the position of each cell, and what became of it, as they end."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        paths = os.pathsep.join([path for path in sys.path if path])
        ray.init(
            address=self.address,
            include_dashboard=False if self.address is None else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": paths}},
        )
        try:
            gpus = self.gpus
            if gpus is None:
                gpus = min(1, ray.cluster_resources().get("GPU", 0))
            task = ray.remote(num_cpus=self.cpus, num_gpus=gpus)(_run)
            running = {task.remote(cell): index for index, cell in enumerate(cells)}
            while running:
                (done, *_), _ = ray.wait(list(running))
                index = running.pop(done)
                try:
                    outcome = ray.get(done)
                except ray.exceptions.RayError as error:
                    reason = str(error).strip().splitlines()[0]
                    outcome = RunError(f"the task of {describe(cells[index].config)}: {reason}")
                yield index, _tell(outcome)
        finally:
            ray.shutdown()


def build(node: Mapping[str, Any]) -> Launcher | Here:
    """Makes the launcher that `_target_` names from the options beside it.

    Raises:
        UserError: for an option that it does not take, or a value that it refuses.
        OmegaConfBaseException: for a value of a wrong type, or an option that it does not take.
    """
    try:
        target = get_object(node["_target_"])
        schema = OmegaConf.structured(target)
    except Exception as error:  # anything can happen while a stranger's module is imported
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(
            f"launcher._target_: {node.get('_target_')} is no launcher ({reason}); accepted are "
            "dataclasses like those of qvlm.launchers"
        ) from error
    options = {key: value for key, value in node.items() if key != "_target_"}
    typed = OmegaConf.merge(OmegaConf.create({"launcher": schema}), {"launcher": options})
    return cast(Launcher | Here, OmegaConf.to_object(typed.launcher))


def launch(launcher: Launcher, configs: Sequence[RunConfig]) -> list[Outcome]:
    """Runs the cells for which there is something to do, and returns what became of each."""
    found = {index: _find(config) for index, config in enumerate(configs)}
    outcomes = {index: outcome for index, outcome in found.items() if outcome is not None}
    left = [index for index in found if index not in outcomes]
    if left:
        with tqdm(total=len(left), desc="cells", disable=None) as bar:
            for position, outcome in launcher.launch([Cell(configs[index]) for index in left]):
                outcomes[left[position]] = outcome
                bar.update()
    for outcome in outcomes.values():
        if isinstance(outcome, Held):
            tqdm.write(f"{outcome}; {LATER}")
    return [outcomes[index] for index in found]


def describe(config: RunConfig) -> str:
    """A cell in a sentence."""
    return f"{config.model.name}, {config.method_name}, {config.bits.label}"


def _find(config: RunConfig) -> Outcome | None:
    """What needs no worker: a record that is there, and a cell that another process computes."""
    from qvlm.cell import inputs as prepare

    config = prepare.adopt(config)
    identity = prepare.identity(config)
    path = prepare.record_path(config, identity)
    if prepare.is_recorded(config, identity):
        tqdm.write(f"reused {path}")
        return path
    owner = find_owner(path)
    return Held(path, owner) if owner else None


def _run(cell: Cell) -> Outcome:
    return cell()


def _run_numbered(index: int, cell: Cell) -> tuple[int, Outcome]:
    return index, replace(cell, config=_with_own_gpu(cell.config))()


def _with_own_gpu(config: RunConfig) -> RunConfig:
    """The same cell on the GPU of this worker, by its number."""
    if config.device != "auto":
        return config
    import torch

    worker = multiprocessing.current_process().name.rpartition("-")[2]
    count = torch.cuda.device_count()
    if count < 2 or not worker.isdigit():
        return config
    return replace(config, device=f"cuda:{(int(worker) - 1) % count}")


def _tell(outcome: Outcome) -> Outcome:
    """Says what a job did whose own output is elsewhere."""
    if isinstance(outcome, Path):
        tqdm.write(f"recorded {outcome}")
    return outcome


def _at_least(key: str, value: float, low: int) -> None:
    if value < low:
        raise UserError(f"launcher.{key}: {value} is not accepted; give a number of at least {low}")


def _need(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"launcher={extra} needs {package}, which is not installed: "
            f".venv/bin/python -m pip install -c constraints.txt -e '.[{extra}]'"
        )

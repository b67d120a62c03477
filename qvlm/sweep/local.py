"""Launchers on this machine: one cell after the other, or several at a time through joblib.

The default, `Auto`, chooses between the two. A second thread gains nothing in the small products of
the embedded models, so their cells run side by side, each on a core of its own.
"""

import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from qvlm.errors import RunError
from qvlm.sweep.job import Job, Outcome
from qvlm.validation import whole_number


@dataclass
class Here:
    """Runs one cell after the other in this process."""

    def launch(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Outcome]]:
        """Yields the position of each job and its outcome, in order."""
        from qvlm.cell import pipeline

        for index, job in enumerate(jobs):
            try:
                yield index, pipeline.run_cell(job.cell)
            except Exception as error:
                yield index, error


@dataclass
class Joblib:
    """Runs several cells at a time, each in a process of this machine.

    Attributes:
        jobs: Number of cells at a time. Each has its part of the cores and, with `device=auto`, a
            GPU of its own as long as there are enough.
    """

    jobs: int = 2

    def __post_init__(self) -> None:
        whole_number("launcher.jobs", self.jobs)

    def launch(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Outcome]]:
        """Yields the position of each job and its outcome, as the jobs end.

        A worker that is killed, for example because memory ran out, ends the whole pool. The jobs
        that are left then run one at a time, which shows whose worker it was.
        """
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        waiting = dict(enumerate(jobs))
        try:
            for index, outcome in self._run(waiting):
                del waiting[index]
                yield index, outcome
        except TerminatedWorkerError:
            tqdm.write(
                f"warning: a worker was killed; {len(waiting)} cells are tried one by one",
                file=sys.stderr,
            )
            for index, job in waiting.items():
                try:
                    yield from self._run({index: job})
                except TerminatedWorkerError:
                    yield (
                        index,
                        RunError(
                            f"the worker of {job} was killed, perhaps because memory ran out. A "
                            "smaller launcher.jobs needs less."
                        ),
                    )

    def _run(self, jobs: Mapping[int, Job]) -> Iterator[tuple[int, Outcome]]:
        from joblib import Parallel, delayed

        # At least two, because joblib would run a single one in this process.
        count = max(min(self.jobs, len(jobs)), 2)
        parallel = Parallel(n_jobs=count, batch_size=1, return_as="generator_unordered")
        work = (delayed(_run_numbered)(index, job) for index, job in list(jobs.items()))
        yield from parallel(work)


@dataclass
class Auto(Here):
    """Runs cells of embedded models on a CPU one per core, and any others one after the other.

    Cells of embedded models that run side by side get one thread each, unless `threads` says
    otherwise. There are no more of them at a time than fit the memory that is free.
    """

    def launch(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Outcome]]:
        """Yields the position of each job and its outcome."""
        from qvlm.cell.inputs import gains_no_threads
        from qvlm.sweep.plan import other_ranks

        alike = not other_ranks() and all(gains_no_threads(job.cell.config) for job in jobs)
        count = min(len(jobs), cores(), free_bytes() // CELL_BYTES) if alike else 1
        if count > 1:
            jobs = [replace(job, cell=job.cell.with_threads(1)) for job in jobs]
            yield from Joblib(count).launch(jobs)
        else:
            yield from super().launch(jobs)


# What a cell of an embedded model needs at most; its resident set is about 1 GiB.
CELL_BYTES = 3 * 2**29


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_bytes() -> int:
    """The bytes of main memory that new processes may take."""
    import psutil

    return int(psutil.virtual_memory().available)


def _run_numbered(index: int, job: Job) -> tuple[int, Outcome]:
    device = worker_device(job.cell.config.device)
    if device != job.cell.config.device:
        job = replace(job, cell=job.cell.on(device))
    return index, job()


def worker_device(device: str) -> str:
    """The device of this joblib worker: by its number a GPU, if "auto" leaves the choice open."""
    if device != "auto":
        return device
    import torch

    worker = multiprocessing.current_process().name.rpartition("-")[2]
    count = torch.cuda.device_count()
    if count < 2 or not worker.isdigit():
        return device
    return f"cuda:{(int(worker) - 1) % count}"

"""The launcher that runs each cell as a Slurm job, through submitit."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qvlm.errors import RunError, UserError
from qvlm.sweep.job import Job, Outcome, report, require_package
from qvlm.validation import one_of, positive, whole_number

POLL = {"slurm": 15.0, "local": 0.5}  # seconds between two looks for results


@dataclass
class Slurm:
    """Runs a Slurm job for each cell. All jobs are submitted as one array.

    Attributes:
        partition: Name of the partition. Null stands for the cluster's default.
        gpus: Number of GPUs that each job requests.
        cpus: Number of CPU cores that each job requests.
        memory_gib: Memory that each job requests, in GiB.
        hours: Time limit of each job, in hours. A job that needs more is queued again, up to three
            times, and resumes its cell.
        jobs: Number of jobs that may run at a time. Null leaves it to the cluster.
        sbatch: Other options of sbatch.
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
        whole_number("launcher.gpus", self.gpus, 0)
        whole_number("launcher.cpus", self.cpus)
        positive("launcher.memory_gib", self.memory_gib)
        positive("launcher.hours", self.hours)
        if self.jobs is not None:
            whole_number("launcher.jobs", self.jobs)
        one_of("launcher.cluster", self.cluster, POLL)
        require_package("submitit", "slurm")
        if self.cluster == "slurm" and shutil.which("srun") is None:
            raise UserError(
                "launcher=slurm is not possible, because srun is not on this machine. Start the "
                "sweep where jobs are submitted, or try launcher.cluster=local."
            )

    def launch(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Outcome]]:
        """Submits all jobs, and yields the position of each and its outcome, as they end.

        After an interrupt the jobs of a cluster go on, and a message says how to cancel them.
        """
        from submitit import AutoExecutor
        from submitit.core.utils import FailedJobError, UncompletedJobError
        from submitit.helpers import as_completed

        logs = Path(jobs[0].cell.config.results_dir) / "slurm"
        executor = AutoExecutor(logs, cluster=self.cluster)
        executor.update_parameters(**self.parameters())
        with executor.batch():
            submitted = [executor.submit(job) for job in jobs]
        tqdm.write(f"submitted {len(submitted)} jobs; what they print is in {logs}")
        positions = {job.job_id: index for index, job in enumerate(submitted)}
        try:
            for job in as_completed(submitted, poll_frequency=POLL[self.cluster]):
                index = positions[job.job_id]
                try:
                    outcome = job.result()
                except (FailedJobError, UncompletedJobError):
                    outcome = RunError(
                        f"job {job.job_id} of {jobs[index]} ended without a result (state "
                        f"{job.state}); see {job.paths.stderr}"
                    )
                yield index, report(outcome)
        except BaseException:
            left = [job for job in submitted if not job.done()]
            if self.cluster == "local":
                for job in left:
                    job.cancel()
            elif left:
                arrays = sorted({job.job_id.partition("_")[0] for job in left})
                tqdm.write(
                    f"{len(left)} Slurm jobs go on; `scancel {' '.join(arrays)}` cancels them",
                    file=sys.stderr,
                )
            raise

    def parameters(self) -> dict[str, Any]:
        """The options under the names that submitit gives them."""
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

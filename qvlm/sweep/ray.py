"""The launcher that runs each cell as a Ray task."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qvlm.errors import RunError
from qvlm.sweep.job import Job, Outcome, report, require_package, run_job
from qvlm.validation import number, whole_number


@dataclass
class Ray:
    """Runs a Ray task for each cell.

    Attributes:
        address: Address of a cluster, or "auto". Null starts Ray on this machine.
        gpus: Number of GPUs that each task requests. Null stands for one if there are any.
        cpus: Number of CPU cores that each task requests.
    """

    address: str | None = None
    gpus: float | None = None
    cpus: int = 1

    def __post_init__(self) -> None:
        if self.gpus is not None:
            number("launcher.gpus", self.gpus)
        whole_number("launcher.cpus", self.cpus)
        require_package("ray", "ray")

    def launch(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Outcome]]:
        """Yields the position of each job and its outcome, as the jobs end."""
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
            task = ray.remote(num_cpus=self.cpus, num_gpus=gpus)(run_job)
            running = {task.remote(job): index for index, job in enumerate(jobs)}
            while running:
                (done, *_), _ = ray.wait(list(running))
                index = running.pop(done)
                try:
                    outcome = ray.get(done)
                except ray.exceptions.RayError as error:
                    reason = str(error).strip().splitlines()[0]
                    outcome = RunError(f"the task of {jobs[index]} ended: {reason}")
                yield index, report(outcome)
        finally:
            ray.shutdown()

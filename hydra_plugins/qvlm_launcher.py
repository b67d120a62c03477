"""Where the cells of a sweep run: Hydra's launcher for everything that `launcher=NAME` names.

Hydra's own plugins for joblib, submitit and Ray give up the other jobs of a sweep when one job
dies, and one of them needs an older cloudpickle than the rest of this project. `qvlm.sweep` uses
the three libraries directly, which takes less code than working around that. `hydra/launcher=NAME`
still chooses any other plugin.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn, JobStatus

if TYPE_CHECKING:  # importing these imports PyTorch
    from qvlm.cell.identity import Cell
    from qvlm.sweep.job import Outcome
    from qvlm.sweep.progress import SweepProgress


class CellLauncher(BasicLauncher):
    """Runs cells as the `launcher` node of their configuration says."""

    def launch_cells(
        self, cells: "Sequence[Cell]", progress: "SweepProgress | None" = None
    ) -> "list[Outcome]":
        """Runs cells of one sweep, and returns the outcome of each, in order."""
        from qvlm.sweep.launch import build, launch

        return launch(build(cells[0].config.launcher), cells, progress)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Does the same for a sweeper other than `CellSweeper`, which hands on overrides only."""
        from qvlm.cell.identity import Cell
        from qvlm.cell.settled import require_agreement
        from qvlm.config.compose import from_hydra

        assert self.hydra_context is not None
        compose = self.hydra_context.config_loader.load_sweep_config
        configs = [from_hydra(compose(self.config, list(job))) for job in job_overrides]
        for config, job in zip(configs, job_overrides, strict=True):
            if config.model.packed is not None:
                require_agreement(config, job)
        returns = []
        for outcome in self.launch_cells([Cell.of(config) for config in configs]):
            done = JobReturn()
            done.return_value, done.status = outcome, JobStatus.COMPLETED
            returns.append(done)
        return returns

"""Where the cells of a sweep run: what Hydra calls a launcher, for all that `launcher=` names.

Hydra's own plugins for joblib, submitit and Ray give up a sweep's other jobs when one job dies, and
one of them asks for an older cloudpickle than the rest of this project; `qvlm.launchers` uses the
three libraries directly, which takes less code than to go around that. `hydra/launcher=NAME` still
chooses any other plugin.
"""

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn, JobStatus


class CellLauncher(BasicLauncher):
    """Runs jobs as the `launcher` node of their configuration says."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Runs a batch; the value of a job is the folder of its record, or what went wrong."""
        from qvlm.config.schema import from_hydra
        from qvlm.sweep.launchers import Here, build, launch

        assert self.hydra_context is not None
        compose = self.hydra_context.config_loader.load_sweep_config
        configs = [from_hydra(compose(self.config, list(job))) for job in job_overrides]
        launcher = build(configs[0].launcher)
        if isinstance(launcher, Here):
            return super().launch(job_overrides, initial_job_idx)
        returns = []
        for outcome in launch(launcher, configs):
            done = JobReturn()
            done.return_value, done.status = outcome, JobStatus.COMPLETED
            returns.append(done)
        return returns

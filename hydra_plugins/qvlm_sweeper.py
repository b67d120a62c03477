"""What `-m` does: every combination of the given values, checked first, full precision first.

Hydra finds sweepers in the namespace package `hydra_plugins`. This one is Hydra's own expansion
with four differences. All cells are composed, checked and identified before the first one runs.
Cells that are the same (full precision at every bit width) run once. Full-precision cells are a
batch of their own, which must succeed before a quantized cell starts, because they show a wrong
checkpoint or prompt. Cells that another process computes are left for the end.

A cell that fails does not stop the others of its batch. All failures are raised together.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from qvlm.command import STARTING, busy

if TYPE_CHECKING:  # importing it imports PyTorch
    from qvlm.cell.identity import Cell
    from qvlm.sweep.progress import SweepProgress


class CellSweeper(BasicSweeper):
    """Expands like `BasicSweeper`, and runs the batches that `qvlm.sweep.plan` makes."""

    def sweep(self, arguments: list[str]) -> Any:
        """Runs all combinations of `arguments` and of `hydra.sweeper.params`.

        Raises:
            ExceptionGroup: with the failure of every cell that failed.
        """
        from qvlm.records.locks import Held, Watch
        from qvlm.sweep.plan import plan  # imported only when there is something to sweep
        from qvlm.sweep.progress import SweepProgress

        assert self.hydra_context is not None
        assert self.config is not None
        loader, master = self.hydra_context.config_loader, self.config
        parser = OverridesParser.create(config_loader=loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        (combinations,) = self.split_arguments(overrides, None)
        outcomes: list[Any] = []
        failures: list[Exception] = []
        held: list[tuple[tuple[list[str], Cell], Held]] = []

        def run(batch: "Sequence[tuple[list[str], Cell]]") -> None:
            done = self._launch(batch, len(outcomes), progress)
            for planned, outcome in zip(batch, done, strict=True):
                outcomes.append(outcome)
                if isinstance(outcome, Held):
                    held.append((planned, outcome))
                elif isinstance(outcome, Exception):
                    failures.append(outcome)

        with busy(STARTING):
            compose = lambda job: loader.load_sweep_config(master, job)  # noqa: E731
            batches = list(plan(combinations, compose))
        with SweepProgress([cell for batch in batches for _, cell in batch]) as progress:
            for batch in batches:
                if failures:
                    raise ExceptionGroup("full precision failed", failures)
                run(batch)
            watch = Watch()
            while held:
                free = watch.wait([at.record for _, at in held])
                batch = [held[index][0] for index in free]
                held = [other for index, other in enumerate(held) if index not in free]
                run(batch)
        if recorded := [outcome for outcome in outcomes if isinstance(outcome, Path)]:
            from qvlm.summary import print_summary

            print_summary(recorded)
        if failures:
            raise ExceptionGroup("cells failed", failures)
        return outcomes

    def _launch(
        self, batch: "Sequence[tuple[list[str], Cell]]", index: int, progress: "SweepProgress"
    ) -> list[Any]:
        """Runs a batch with our launcher, or with another plugin, which knows overrides only."""
        from hydra_plugins.qvlm_launcher import CellLauncher

        assert self.launcher is not None
        if isinstance(self.launcher, CellLauncher):
            return list(self.launcher.launch_cells([cell for _, cell in batch], progress))
        jobs = [overrides for overrides, _ in batch]
        return [job.return_value for job in self.launcher.launch(jobs, initial_job_idx=index)]

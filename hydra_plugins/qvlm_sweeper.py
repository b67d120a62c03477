"""What `-m` does: every combination of the given values, checked first, full precision first.

Hydra finds sweepers in the namespace package `hydra_plugins`; this one is Hydra's own expansion
with three differences. All cells are composed and checked before the first one runs. Cells that are
the same (full precision at every bit width) are run once. Full-precision cells are launched as a
batch of their own and must succeed before a quantized cell starts, in parallel launchers too: a
wrong checkpoint or prompt shows there and nowhere else.

A cell that fails does not stop the others of its batch; all failures are raised together.
"""

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser


class CellSweeper(BasicSweeper):
    """Expands like `BasicSweeper` and runs what `qvlm.cli.plan` makes of it."""

    def sweep(self, arguments: list[str]) -> Any:
        """Runs all combinations of `arguments` and of `hydra.sweeper.params`.

        Raises:
            ExceptionGroup: with the failure of every cell that failed.
        """
        from qvlm.cli import plan  # imports this project only when there is something to sweep

        assert self.hydra_context is not None
        assert self.config is not None
        assert self.launcher is not None
        loader = self.hydra_context.config_loader
        parser = OverridesParser.create(config_loader=loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        (combinations,) = self.split_arguments(overrides, None)
        master = self.config
        returns: list[Sequence[Any]] = []
        for batch in plan(combinations, lambda job: loader.load_sweep_config(master, job)):
            results = self.launcher.launch(batch, initial_job_idx=sum(map(len, returns)))
            values = [result.return_value for result in results]
            if failures := [value for value in values if isinstance(value, Exception)]:
                raise ExceptionGroup("cells failed", failures)
            returns.append(results)
        return returns

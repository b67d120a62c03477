"""What `-m` does: every combination of the given values, checked first, full precision first.

Hydra finds sweepers in the namespace package `hydra_plugins`; this one is Hydra's own expansion
with four differences. All cells are composed and checked before the first one runs. Cells that are
the same (full precision at every bit width) are run once. Full-precision cells are launched as a
batch of their own and must succeed before a quantized cell starts, in parallel launchers too: a
wrong checkpoint or prompt shows there and nowhere else. Cells that another process computes are
left for the end, full precision too, since that other process sees to it.

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
        from qvlm.records.locks import Held, Watch

        assert self.hydra_context is not None
        assert self.config is not None
        assert self.launcher is not None
        launcher = self.launcher
        loader = self.hydra_context.config_loader
        parser = OverridesParser.create(config_loader=loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        (combinations,) = self.split_arguments(overrides, None)
        master = self.config
        returns: list[Sequence[Any]] = []
        failures: list[Exception] = []
        held: list[tuple[list[str], Held]] = []

        def run(batch: list[list[str]]) -> None:
            results = launcher.launch(batch, initial_job_idx=sum(map(len, returns)))
            returns.append(results)
            for job, result in zip(batch, results, strict=True):
                value = result.return_value
                if isinstance(value, Held):
                    held.append((job, value))
                elif isinstance(value, Exception):
                    failures.append(value)

        for batch in plan(combinations, lambda job: loader.load_sweep_config(master, job)):
            if failures:
                raise ExceptionGroup("full precision failed", failures)
            run(batch)
        watch = Watch()
        while held:
            free = watch.wait([at.record for _, at in held])
            batch = [held[index][0] for index in free]
            held = [other for index, other in enumerate(held) if index not in free]
            run(batch)
        if failures:
            raise ExceptionGroup("cells failed", failures)
        return returns

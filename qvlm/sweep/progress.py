"""The bar over all cells of a sweep, with an estimate of the time that is left.

The estimate is made of seconds that cells of the same model and method took, in this sweep or in
records beside it. A cell that nothing is known of counts as the mean of the others, so the estimate
is rough until each method has run once. Nothing shows where stderr is not a terminal.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:  # importing it imports PyTorch
    from qvlm.cell.identity import Cell

FORMAT = "{desc}: {n_fmt}/{total_fmt} cells |{bar}| {elapsed}{postfix}"


@dataclass(frozen=True)
class Cost:
    """What a recorded cell took.

    Attributes:
        fixed: Seconds of all stages but the evaluation.
        question: Seconds per question.
        questions: Number of questions.
    """

    fixed: float
    question: float
    questions: int

    @classmethod
    def of(cls, run: Mapping[str, Any]) -> "Cost":
        """Reads the cost from the content of `run.json`."""
        stages = run["stages"]
        questions = sum(run["questions_per_process"])
        asked = questions - stages["evaluate"].get("resumed_questions", 0)
        fixed = sum(stage["seconds"] for name, stage in stages.items() if name != "evaluate")
        return cls(fixed, stages["evaluate"]["seconds"] / max(1, asked), questions)

    def seconds(self, questions: int | None) -> float:
        """Returns the seconds of a cell with this number of questions, or with as many as here."""
        return self.fixed + self.question * (self.questions if questions is None else questions)


@dataclass
class Estimates:
    """Seconds that cells will take, by what others took.

    Attributes:
        costs: Costs of recorded cells, by model and method.
    """

    costs: dict[tuple[str, str], list[Cost]] = field(default_factory=lambda: defaultdict(list))

    def learn(self, path: Path) -> Cost | None:
        """Adds what a recorded cell took, and returns it; None if the folder is not a record."""
        try:
            from qvlm.records.record import read_run  # imports pandas

            run = read_run(path)
            cost = Cost.of(run)
            self.costs[run["model"], run["method_name"]].append(cost)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # an estimate does without it
        return cost

    def seconds(self, cell: "Cell") -> float | None:
        """Returns the seconds that a cell will take, or None if no cell is recorded."""
        config = cell.config
        own = self.costs.get((config.model.name, config.method_name))
        of_model = [
            c
            for (model, _), costs in self.costs.items()
            for c in costs
            if model == config.model.name
        ]
        every = [c for costs in self.costs.values() for c in costs]
        known = own or of_model or every
        return fmean(c.seconds(config.evaluation.limit) for c in known) if known else None


class SweepProgress:
    """Shows how many cells of a sweep are done, and how long the others will take.

    Args:
        cells: All cells of the sweep.
    """

    def __init__(self, cells: Sequence["Cell"]) -> None:
        self._waiting = {cell.path: cell for cell in cells}
        self._estimates = Estimates()
        for folder in sorted({cell.config.runs_dir for cell in cells}):
            for path in folder.glob("[!.]*"):
                self._estimates.learn(path)
        self._begun = self._updated = time.monotonic()
        self._work = 0.0
        self._left: float | None = None
        self._bar: tqdm[Any] = tqdm(
            total=len(self._waiting), desc="sweep", bar_format=FORMAT, disable=None
        )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "SweepProgress":
        self._estimate()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._bar.set_postfix_str(self.left() if self._waiting else "", refresh=False)
        self._bar.close()

    def done(self, cell: "Cell", computed: bool = True) -> None:
        """Takes a cell off the list.

        Args:
            cell: Cell that is recorded, or failed.
            computed: Whether it was computed in this sweep.
        """
        if self._waiting.pop(cell.path, None) is None:
            return
        if computed and (cost := self._estimates.learn(cell.path)):
            self._work += cost.seconds(None)
        self._estimate()
        self._bar.update()

    def left(self) -> str:
        """Returns the time that is left, in words."""
        if not self._waiting:
            return ""
        if self._left is None:
            return "the first cell will tell how long"
        left = max(0.0, self._left - (time.monotonic() - self._updated))
        return f"about {tqdm.format_interval(left)} left"

    def _estimate(self) -> None:
        """Divides the work that is left by the number of cells that ran at a time."""
        now = time.monotonic()
        seconds = [self._estimates.seconds(cell) for cell in self._waiting.values()]
        known = [each for each in seconds if each is not None]
        at_a_time = max(1.0, self._work / max(1e-9, now - self._begun))
        self._left = sum(known) / at_a_time if known else None
        self._updated = now

    def _tick(self) -> None:
        while not self._ended.wait(1):
            self._bar.set_postfix_str(self.left())

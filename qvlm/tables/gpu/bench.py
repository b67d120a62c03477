"""The file of measured lines, and what measures a task."""

import csv
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qvlm.tables.gpu.forms import Sizes

COLUMNS = (
    *("section", "model", "form", "batch", "setting"),
    *("measure", "value", "unit", "note", "card", "versions"),
)
TASK = COLUMNS[:5]
Measures = Mapping[str, tuple[object, str]]
"""Value and unit of each measure of a task."""


class Results:
    """The file of measured lines.

    Args:
        path: Path of the CSV file, which is created if needed.
        card: Name of the card whose lines count as measured.
        versions: Versions that are written to each line.
    """

    def __init__(self, path: Path, card: str, versions: str) -> None:
        self.path, self.card, self.versions = path, card, versions
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
        with path.open(encoding="utf-8", newline="") as file:
            self.rows = [row for row in csv.DictReader(file) if row["unit"] is not None]

    def has(self, *task: object) -> bool:
        """Whether there are lines of a task (section, model, form, batch, setting)."""
        wanted = [*map(str, task), self.card]
        return any([row[name] for name in (*TASK, "card")] == wanted for row in self.rows)

    def add(self, task: Sequence[object], measures: Measures, note: str) -> None:
        """Appends the lines of a task in one write."""
        rows = []
        for measure, (value, unit) in measures.items():
            cells = (*task, measure, value, unit, note, self.card, self.versions)
            rows.append(dict(zip(COLUMNS, map(str, cells), strict=True)))
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(rows)
        self.rows += rows
        shown = ", ".join(f"{name} {value} {unit}" for name, (value, unit) in measures.items())
        print(f"{' | '.join(map(str, task))}: {shown} {note}", flush=True)


@dataclass
class Bench:
    """A device, the sizes to measure on it, and where results go.

    Attributes:
        device: "cuda", or "cpu" for a dry run.
        sizes: Sizes of the run.
        results: File of measured lines.
        ends: Time of `time.monotonic` after which no task begins.
        failed: Number of tasks that failed.
        kept: CUDA graphs, with the calls that they replay and whose tensors they do not own.
    """

    device: str
    sizes: Sizes
    results: Results
    ends: float
    failed: int = 0
    kept: list[object] = field(default_factory=list)

    @property
    def gpu(self) -> bool:
        """Whether this is a GPU and not a dry run."""
        return self.device != "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """Type of models. Triton's interpreter truncates to bf16 instead of rounding."""
        return torch.bfloat16 if self.gpu else torch.float32

    def do(self, *task: object, work: Callable[[], Measures], note: str = "") -> None:
        """Does a task if its lines are missing and there is time. Prints and counts a failure."""
        if self.results.has(*task) or time.monotonic() > self.ends:
            return
        begun = time.monotonic()
        try:
            measures = dict(work())
        except Exception:  # other tasks must not be lost on a machine that is there for minutes
            self.failed += 1
            print(f"FAILED {task}", flush=True)
            traceback.print_exc()
            self.clear()
            return
        measures["seconds of this task"] = (f"{time.monotonic() - begun:.1f}", "s")
        self.results.add(task, measures, note)

    def clear(self) -> None:
        """Frees memory, that of graphs included."""
        self.kept.clear()
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Waits for the device."""
        if self.gpu:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object], repeats: int | None = None) -> float:
        """Returns the median time of some calls, after one call to warm up."""
        call()
        times = []
        for _ in range(min(repeats or self.sizes.repeats, self.sizes.repeats)):
            self.wait()
            begun = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - begun)
        return statistics.median(times)

    def graph(self, call: Callable[[], object]) -> Callable[[], object]:
        """Returns a function that replays a call as a CUDA graph, or on a CPU the call itself."""
        if not self.gpu:
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            call()
        self.kept.append((graph, call))
        return graph.replay

"""Stages of a cell: a progress bar over them, and the time and memory that each one took.

Host memory is sampled every 20 ms, because the operating system's own high-water mark cannot be
reset per stage. GPU memory is the exact peak of PyTorch's allocator, summed over the GPUs. The
thread that samples also moves the bar every second, whatever the stage does. The bar is silent
where stderr is not a terminal.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import psutil
import torch
from tqdm import tqdm

INTERVAL = 0.02  # seconds
MIB = 2**20
FORMAT = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}"


class Stages:
    """Runs the stages of one cell and records what each of them cost.

    Args:
        title: Title of the progress bar.
        count: Number of stages.

    Attributes:
        costs: Costs by the name of the stage: `seconds`, `peak_mib` (peak resident memory of this
            process in MiB) and, with a GPU, `gpu_peak_mib`.
    """

    def __init__(self, title: str, count: int) -> None:
        self.costs: dict[str, dict[str, float]] = {}
        self._bar: tqdm[Any] = tqdm(total=count, desc=title, bar_format=FORMAT, disable=None)

    def __enter__(self) -> "Stages":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures the block as one stage. A stage that raises has no costs."""
        self._bar.set_postfix_str(name)
        gpu = torch.cuda.is_available()
        gpus = range(torch.cuda.device_count()) if gpu else ()
        for index in gpus:
            torch.cuda.reset_peak_memory_stats(index)
        start = time.perf_counter()
        with _PeakMemory(self._bar.refresh) as memory:
            yield
            if gpu:
                torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        self.costs[name] = {"seconds": round(seconds, 3), "peak_mib": round(memory.peak / MIB, 1)}
        if gpu:
            peak = sum(map(torch.cuda.max_memory_allocated, gpus)) / MIB
            self.costs[name]["gpu_peak_mib"] = round(peak, 1)
        self._bar.update()


class _PeakMemory:
    """Samples the resident memory of this process from a thread.

    Args:
        each_second: Function that the thread calls every second.

    Attributes:
        peak: Highest value seen, in bytes.
    """

    def __init__(self, each_second: Callable[[], object]) -> None:
        self.peak = 0
        self._each_second = each_second
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_PeakMemory":
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        shown = time.monotonic()
        while not self._done.wait(INTERVAL):
            self._sample()
            if time.monotonic() - shown >= 1:
                shown = time.monotonic()
                self._each_second()

    def _sample(self) -> None:
        self.peak = max(self.peak, self._process.memory_info().rss)

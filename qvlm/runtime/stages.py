"""The stages of a cell: a progress bar over them, and what each took in seconds and memory.

Memory is the highest resident size that a thread saw, looking every 20 ms: the operating system's
own high-water mark cannot be taken per stage. On GPUs the allocators' peaks are exact; those of
several cards are added up. Without a terminal the bar is silent.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import psutil
import torch
from tqdm import tqdm

from qvlm.quantization import Block, Walk

INTERVAL = 0.02  # seconds
MIB = 2**20
FORMAT = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}"


class Stages:
    """Runs the named parts of one cell and remembers their cost.

    Args:
        title: what the bar is called.
        count: how many stages there will be.

    Attributes:
        costs: stage -> seconds, peak_mib (resident memory) and, on a GPU, gpu_peak_mib.
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
        """Times what happens inside."""
        self._bar.set_postfix_str(name)
        gpu = torch.cuda.is_available()
        cards = range(torch.cuda.device_count()) if gpu else ()
        for card in cards:
            torch.cuda.reset_peak_memory_stats(card)
        start = time.perf_counter()
        with _PeakMemory() as memory:
            yield
            if gpu:
                torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        self.costs[name] = {"seconds": round(seconds, 3), "peak_mib": round(memory.peak / MIB, 1)}
        if gpu:
            peak = sum(map(torch.cuda.max_memory_allocated, cards)) / MIB
            self.costs[name]["gpu_peak_mib"] = round(peak, 1)
        self._bar.update()


class _PeakMemory:
    """Watches the resident memory of this process, in bytes."""

    def __init__(self) -> None:
        self.peak = 0
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_PeakMemory":
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, self._process.memory_info().rss)


class ShownWalk(Walk):
    """The calibration walk with a progress bar over its blocks.

    Attributes:
        finished: how many blocks an earlier process has done.
    """

    finished = 0

    def blocks(self, partition: Sequence[Sequence[str]] | None = None) -> Iterator[Block]:
        """The blocks in execution order."""
        total = len(self.names if partition is None else partition)
        with tqdm(
            total=total,
            initial=self.finished,
            desc="blocks",
            unit="block",
            leave=False,
            disable=None,
        ) as bar:
            for block in super().blocks(partition):
                bar.set_postfix_str(block.name)
                yield block
                bar.update()

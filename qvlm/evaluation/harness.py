"""What surrounds every call of lm-eval: silence, one process, and the caller's random states."""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import lm_eval.api.metrics as metrics
import lm_eval.api.task as task
import torch


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Silences lm-eval's notices and its bars, which would show even without a terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            _replaced(task, "tqdm", partial(task.tqdm, disable=True)),
            _replaced(metrics, "bootstrap_stderr", _bootstrap_stderr),
        ):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def preserved(device: torch.device) -> Iterator[None]:
    """Restores the caller's random states, of torch and of Python.

    Sampling seeds torch, and lm-eval draws task names from Python's generator.
    """
    state = random.getstate()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(state)


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _bootstrap_stderr(
    statistic: Callable[[Sequence[Any]], float], values: Sequence[Any], iters: int
) -> float:
    """Returns lm-eval's resampled standard error, without a process for each core."""
    resamples = metrics._bootstrap_internal(statistic, iters)((0, values))
    return float(metrics.sample_stddev(resamples))

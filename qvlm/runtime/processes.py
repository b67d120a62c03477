"""A function call in a process of its own, whose memory can be measured without anything else."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function in a new process that is started for this call and ends after it.

    Args:
        function: Function that can be pickled, as can its arguments and its return value.
        *arguments: Positional arguments of the function.

    Returns:
        The return value of the function. An exception of the function is raised here.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()

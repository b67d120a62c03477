"""A function runs in a process that has done nothing else."""

import os

import pytest

from qvlm.runtime.processes import in_fresh_process


def test_a_fresh_process_returns_the_value() -> None:
    assert in_fresh_process(os.getpid) not in (os.getpid(), in_fresh_process(os.getpid))
    assert in_fresh_process(max, 2, 3) == 3


def test_an_exception_comes_back() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        in_fresh_process(int, "x")

"""Processes with Triton's interpreter, which must be on before Triton is imported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def helper(name: str) -> str:
    """Returns the path of a file in this folder."""
    return str(Path(__file__).with_name(name))


def interpreted(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with arguments, in one thread, with Triton's interpreter."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )

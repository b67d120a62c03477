"""The decoder for GPUs, under Triton's interpreter in a process of its own."""

import pytest

from tests.helpers.interpreter import helper, interpreted, needs_triton

pytestmark = pytest.mark.slow


@needs_triton
def test_the_decoder_says_what_the_model_says() -> None:
    checks = helper("triton_decoder.py")
    done = interpreted("-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", checks)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]

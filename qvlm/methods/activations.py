"""The option of a method to quantize the language model's activations per token.

The granularity of activations is the quantizer's, and all methods share it. A method whose rows
stand in one table under both granularities has an option of its own instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from qvlm.quantization.calibration import Walk


@contextmanager
def activations(walk: Walk, per_token: bool) -> Iterator[None]:
    """Makes a walk quantize the language model's activations per token while the context is open.

    Args:
        walk: Walk whose quantization is changed.
        per_token: Whether to do so; if not, nothing is changed.
    """
    shared = walk.quantization
    if per_token:
        language = replace(shared.language, granularity="per_token")
        walk.quantization = replace(shared, language=language)
    try:
        yield
    finally:
        walk.quantization = shared


def titled(name: str, per_token: bool) -> str:
    """The name of a method in tables, with its granularity if that is its own."""
    return f"{name}, per token" if per_token else name

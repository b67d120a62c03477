"""Which floating-point type a CPU multiplies fast.

Checkpoints are in half precision, and a GPU computes in it. A CPU without AVX-512 multiplies both
half types several times slower than float32, which nothing but a measurement tells.
"""

import functools
import time

import torch

TELLING = 1.5  # a slowdown that is worth a sentence: others are noise


def advice(dtype: str, device: str) -> str | None:
    """Returns a sentence if a model would run faster in float32, or None.

    Args:
        dtype: Type in which the model computes, as `model.dtype` has it.
        device: Device it runs on.
    """
    if device != "cpu" or dtype not in ("bfloat16", "float16"):
        return None
    ratio = slowdown(dtype)
    if ratio < TELLING:
        return None
    return (
        f"This CPU multiplies matrices in float32 {ratio:.1f} times faster than in {dtype}. "
        f"Give model.dtype=float32 instead of model.dtype={dtype} if memory allows."
    )


@functools.cache
@torch.inference_mode()
def slowdown(dtype: str) -> float:
    """Times products of 256 rows by 1024 x 1024 weights, as in a prompt, in two types by turns.

    Args:
        dtype: Type to compare with float32.

    Returns:
        Seconds in that type over seconds in float32, the least of three each.
    """
    types = (getattr(torch, dtype), torch.float32)
    operands = [(torch.ones(256, 1024, dtype=t), torch.ones(1024, 1024, dtype=t)) for t in types]
    seconds: list[list[float]] = [[], []]
    for _ in range(4):
        for taken, (rows, weights) in zip(seconds, operands, strict=True):
            begun = time.perf_counter()
            torch.nn.functional.linear(rows, weights)
            taken.append(time.perf_counter() - begun)
    half, single = (min(taken[1:]) for taken in seconds)  # the first also prepares
    return half / single

"""What `kernel=auto` takes: the fastest of the products that give the same answers, as measured.

`preferred` says from device, rows and bit widths which kernel serves a layer. On a CPU, kernels
that sum integers exactly give the same answers, so of these the fastest is taken. At a layer's
first input of some number of rows, each of them is timed on this machine, and so is the product of
floating-point numbers of the same size. That one rounds differently and is never taken instead. But
where it is faster, the record says so, and for layers of `WARNED` weights the user is warned once
with the factor. What smaller layers take is their bookkeeping, which no other kernel would save.

A measurement takes milliseconds, and is kept for this machine in the cache folder, by the shape and
form of the layer, its number of rows, the model's type and the number of threads. A file there that
cannot be read is ignored and replaced. Layers of fewer than `SMALLEST` weights are not timed.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qvlm.packing.kernels import native_build, native_library
from qvlm.packing.kernels.base import Kernel
from qvlm.packing.kernels.native import NATIVE
from qvlm.records.environment import hardware

if TYPE_CHECKING:
    from qvlm.packing.layer import PackedLinear

# The product of floating-point numbers, beside the names of kernels.
FLOAT = "float"
SMALLEST = 2**14
WARNED = 2**20
# Numbers of rows that are timed. A larger input counts as the largest, any other as the next one.
ROWS = (1, 8, 128)
# Weights of the floating-point product that is timed; more are taken to be proportionally slower.
LARGEST = 2**24
# How much slower than floating point a product may be before there is a warning.
TOLERANCE = 1.1
REPEATS = 3


def fastest(
    layer: PackedLinear, rivals: list[Kernel], rows: int, dtype: torch.dtype
) -> tuple[Kernel, dict[str, float]]:
    """Returns the fastest kernel for a layer, and the seconds of each by its name.

    Args:
        layer: Layer on a CPU with its numbers.
        rivals: Kernels that serve the layer and give the same answers, the preferred one first.
        rows: Number of rows of the input.
        dtype: Type of the input.

    Returns:
        Kernel, and seconds for the number of `ROWS` that stands for `rows`. Both are empty of
        measurements where the layer is too small: then the kernel is the first one.
    """
    if not rows or layer.in_features * layer.out_features < SMALLEST:
        return rivals[0], {}
    timed = next((count for count in ROWS if rows <= count), ROWS[-1])
    key = _key(layer, timed, dtype)
    names = [kernel.name for kernel in rivals]
    seconds = _KNOWN.get(key) or _kept().get(key) or {}
    if not {FLOAT, *names} <= seconds.keys():
        seconds = _time(layer, rivals, timed, dtype)
        _keep(key, seconds)
    _KNOWN[key] = seconds
    kernel = min(rivals, key=lambda rival: seconds[rival.name])
    slower = seconds[kernel.name] > TOLERANCE * seconds[FLOAT]
    if slower and layer.in_features * layer.out_features >= WARNED:
        _warn(kernel.name, layer, timed, seconds[kernel.name], seconds[FLOAT])
    return kernel, {name: seconds[name] for name in (*names, FLOAT)}


# Measurements of this process.
_KNOWN: dict[str, dict[str, float]] = {}
_WARNED: set[str] = set()


def _key(layer: PackedLinear, rows: int, dtype: torch.dtype) -> str:
    form = layer.form
    parts = (
        *_machine(),
        f"{torch.get_num_threads()} threads",
        f"{form.out_features} x {form.in_features}",
        f"{form.weight}{form.weight_bits} by {form.group_size}",
        f"{form.inputs}{form.input_bits} by {layer.input_sharing()}",
        str(dtype).removeprefix("torch."),
        f"{rows} rows",
    )
    return ", ".join(parts)


@cache
def _machine() -> tuple[str, ...]:
    """Returns what the speed of this machine depends on, in words."""
    found = hardware()
    return (
        str(found["cpu"]),
        f"{found['cores']} cores",
        torch.backends.cpu.get_cpu_capability(),
        "no library" if native_library.obstacle() else native_library.instruction_set(),
        f"torch {torch.__version__}",
        native_build.version(),
    )


def _time(
    layer: PackedLinear, rivals: list[Kernel], rows: int, dtype: torch.dtype
) -> dict[str, float]:
    width, out = layer.in_features, layer.out_features
    x = torch.linspace(-1, 1, width).repeat(rows, 1).to(dtype)
    some = max(1, min(out, LARGEST // width))
    weight = torch.ones(some, width, dtype=dtype)
    calls: dict[str, Callable[[], object]] = {FLOAT: lambda: x @ weight.T}
    for kernel in rivals:
        calls[kernel.name] = partial(kernel.linear, layer, x, None)
    for call in calls.values():
        call()
    best = dict.fromkeys(calls, math.inf)
    for _ in range(REPEATS):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - begin)
    best[FLOAT] *= out / some
    return best


def _warn(kernel: str, layer: PackedLinear, rows: int, seconds: float, of_float: float) -> None:
    if _WARNED:
        return
    _WARNED.add(kernel)
    obstacle = NATIVE.obstacle(layer)
    reason = f" The kernel native does not serve: {obstacle}." if obstacle else ""
    warnings.warn(
        "Packed products are slower than floating point on this machine: "
        f"{layer.layer_name or 'a linear'} takes {1e3 * seconds:.3g} ms instead of "
        f"{1e3 * of_float:.3g} ms for rows={rows}, "
        f"{seconds / of_float:.1f} times as long, with the kernel {kernel}.{reason} "
        "The record lists other layers.",
        stacklevel=2,
    )


def _file() -> Path | None:
    folder = native_build.cache_folder()
    return folder / "kernels.json" if folder else None


def _kept() -> dict[str, dict[str, float]]:
    """Returns the measurements that the cache folder keeps, by key; none if they are not intact."""
    file = _file()
    try:
        if file is None or not native_build.is_own(file):
            return {}
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: seconds for key, seconds in content.items() if _is_measurement(seconds)}


def _is_measurement(seconds: object) -> bool:
    return isinstance(seconds, dict) and all(
        isinstance(value, float) and 0 < value < math.inf for value in seconds.values()
    )


def _keep(key: str, seconds: dict[str, float]) -> None:
    """Adds a measurement to those of the cache folder, if there is one that can be written."""
    file = _file()
    if file is None:
        return
    try:
        content = json.dumps(_kept() | {key: seconds}, indent=1, sort_keys=True)
        native_build.write_private(file, content.encode())
    except OSError as error:
        warnings.warn(f"Timings of kernels cannot be kept in {file}: {error}.", stacklevel=2)

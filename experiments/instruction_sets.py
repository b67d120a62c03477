"""Times the packed product of a layer on every instruction set of this machine, beside stock ones.

    python experiments/instruction_sets.py
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 QVLM_WITHOUT=avx512,avxvnni,avx512vl \\
        python experiments/instruction_sets.py

The second command shows what a CPU with AVX2 alone compares with. The layer is the largest of
LLaVA-13B at W4A4 with groups of 128 weights, in a model in bf16, on one thread. Products are timed
in turn in one process, in CPU time, so that other jobs of the machine count less. Ratios are those
of each repeat: median (lowest to highest).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from qvlm.markdown import table
from qvlm.packing.formats import pack
from qvlm.packing.kernels import native_build, native_library
from qvlm.records.environment import hardware
from qvlm.tables.cost import median_and_range

OUT, WIDTH, GROUP, BITS = 13824, 5120, 128, 4
STOCK = ("float32", "bf16")


def main() -> None:
    """Prints a table for one row and for many."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 600])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--outputs", type=int, default=OUT, help="outputs of the layer")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{hardware()['cpu']}, PyTorch uses {torch.backends.cpu.get_cpu_capability()}\n")
    lines: list[list[str]] = []
    for rows in options.rows:
        times = _times(rows, options.repeats, options.outputs)
        for name, seconds in times.items():
            ratios = [
                [stock / own for stock, own in zip(times[other], seconds, strict=True)]
                for other in STOCK
            ]
            milliseconds = f"{1e3 * statistics.median(seconds):.2f}"
            lines.append([name, str(rows), milliseconds, *map(median_and_range, ratios)])
    print(table(["product", "rows", "ms", "times float32", "times bf16"], lines, left=1))


def _times(rows: int, repeats: int, outputs: int) -> dict[str, list[float]]:
    """Returns the seconds of each product in each repeat."""
    x, weight = torch.randn(rows, WIDTH), torch.randn(outputs, WIDTH)
    half_x, half = x.bfloat16(), weight.bfloat16()
    codes = torch.randint(2**BITS, (outputs, WIDTH)).to(torch.uint8)
    scale = torch.rand(outputs, WIDTH // GROUP) + 0.1
    zero = torch.randint(2**BITS, scale.shape).to(torch.uint8)
    packed = native_library.Weight(pack(codes, BITS), WIDTH, BITS, GROUP).uniform(scale, zero)
    grid = torch.tensor(0.3), torch.tensor(8.0)

    def product(library: str) -> Tensor:
        return native_library.integer_product(packed, half_x, *grid, BITS, library=library)

    calls: dict[str, Callable[[], Tensor]] = {
        "float32": lambda: x @ weight.T,
        "bf16": lambda: half_x @ half.T,
    }
    for name in native_build.supported():
        if name not in native_build.left_out():
            calls[name] = partial(product, name)
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            weight.sum()  # 280 MB, so that no product finds its weight in a cache
            begin = time.thread_time()
            call()
            found[name].append(time.thread_time() - begin)
    return found


if __name__ == "__main__":
    main()

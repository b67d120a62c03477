"""What the card can do: copies, and stock products in bf16 and int8."""

import torch

from qvlm.tables.gpu.bench import Bench, Measures


def limits(bench: Bench) -> Measures:
    """Measures the limits of the card."""
    count, size = (2**32, 8192) if bench.gpu else (2**16, 64)
    source = torch.randn(count // 4, device=bench.device)
    target = torch.empty_like(source)
    copied = 2 * count / bench.seconds(lambda: target.copy_(source))
    a, b = torch.randn(2, size, size, device=bench.device).to(torch.bfloat16)
    multiplied = 2 * size**3 / bench.seconds(lambda: a @ b)
    c, d = torch.randint(-127, 127, (2, size, size), dtype=torch.int8, device=bench.device)
    integer = 2 * size**3 / bench.seconds(lambda: torch._int_mm(c, d.T))
    return {
        "copy, read and written": (f"{copied / 1e12:.3f}", "TB/s"),
        "bf16 product": (f"{multiplied / 1e12:.0f}", "TFLOP/s"),
        "int8 product": (f"{integer / 1e12:.0f}", "TOP/s"),
    }

"""The tiles that are fastest on this card, for the products of a decoder layer of LLaVA-13B."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from qvlm.packing import PackedLinear, weight_bytes
from qvlm.packing.kernels import triton_inputs
from qvlm.packing.kernels.triton import TRITON, input_grid, input_layout
from qvlm.packing.kernels.triton_kernels import DECODING_ROWS
from qvlm.packing.kernels.triton_launch import TILES, Tile
from qvlm.tables.gpu.bench import Bench, Measures
from qvlm.tables.gpu.correctness import layer_of
from qvlm.tables.gpu.forms import FORMS, TEXT

Key = tuple[str, int, int]
# Shapes of the weights of a layer as the decoder joins them, and rows of a prompt with an image.
JOINED = ((15360, 5120), (5120, 5120), (27648, 5120), (5120, 13824))
PROMPT = TEXT + 256

_FLOAT_FEW = [Tile(*sizes, 1) for sizes in ((2, 8, 1), (4, 8, 1), (1, 8, 1), (8, 8, 4), (4, 16, 2))]
_FEW = [
    Tile(*sizes, 1)
    for sizes in (
        *((1, 16, 4), (2, 8, 2), (2, 8, 4), (2, 16, 4), (2, 32, 4), (4, 4, 2), (4, 8, 2)),
        *((4, 8, 4), (4, 16, 4), (4, 16, 8), (8, 4, 4), (8, 8, 4), (8, 8, 8), (16, 4, 4)),
        *((1, 32, 4), (1, 64, 4), (4, 4, 1), (2, 8, 1), (4, 8, 1), (8, 8, 1), (1, 8, 1)),
        *((1, 16, 1), (2, 4, 1), (2, 16, 1), (1, 16, 2), (2, 16, 2), (4, 16, 2)),
    )
]
_SIXTEEN = [
    Tile(outputs, 16, warps, stages)
    for outputs, warps, stages in (
        *((16, 1, 4), (16, 2, 4), (16, 4, 4), (32, 2, 4), (32, 4, 4), (32, 2, 6)),
        *((64, 4, 3), (64, 4, 4), (64, 4, 6), (128, 4, 4), (32, 1, 5)),
    )
]
_MANY = [
    Tile(*sizes)
    for sizes in (
        *((64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 3)),
        *((128, 64, 4, 4), (128, 128, 8, 3)),
        *((64, 128, 4, 5), (256, 64, 8, 3), (128, 64, 4, 2), (64, 64, 4, 2), (128, 64, 8, 3)),
        *((128, 32, 4, 3), (64, 32, 4, 4)),
    )
]


def candidates(product: str, most: int) -> list[Tile]:
    """Returns the tiles to try for a product of at most `most` rows."""
    if product == "many":
        return _SIXTEEN if most == 16 else _MANY
    return _FEW if product == "few" else _FLOAT_FEW


def tune_all(bench: Bench) -> None:
    """Finds the fastest tile of each product, and leaves it in `TILES`."""
    measured = {
        row["setting"]: row["value"] for row in bench.results.rows if row["measure"] == "tile"
    }
    for key in list(TILES):
        title = " ".join(map(str, key))
        if title in measured:
            TILES[key] = Tile(*map(int, measured[title].split()))
        else:
            bench.do("tile", "", "", "", title, work=partial(tune, bench, key))


def tune(bench: Bench, key: Key) -> Measures:
    """Finds the fastest tile of a product: of the sum over the shapes of a layer."""
    product, bits, most = key
    form = next(f for f in FORMS if f.bits == bits and f.normal_float == ("float" in product))
    rows = {DECODING_ROWS: 1, 16: 16}.get(most, PROMPT)
    tried = candidates(product, most)
    shapes: Sequence[tuple[int, int]] = JOINED
    if not bench.gpu:
        widest = max(tried, key=lambda tile: tile.outputs)  # the fewest programs to interpret
        rows, tried, shapes = min(rows, 6), [widest], bench.sizes.shapes
    layers = [layer_of(bench, form, shape) for shape in shapes]
    inputs = [torch.randn(rows, s[1], device=bench.device, dtype=bench.dtype) for s in shapes]
    before = TILES[key]
    if bench.gpu and not form.normal_float:
        _compile_all(key, tried, layers[-1], inputs[-1])
    pairs = zip(layers, inputs, strict=True)
    calls = [partial(TRITON.linear, layer, x, None) for layer, x in pairs]
    found: dict[Tile, float] = {}
    try:
        for tile in tried:
            TILES[key] = tile
            try:
                found[tile] = _device_seconds(bench, calls)
            except Exception as error:  # for example, too much shared memory
                print(f"  {key} {tile}: {str(error).splitlines()[0][:120]}")
    finally:
        TILES[key] = min(found, key=lambda tile: found[tile], default=before)
    best, seconds = TILES[key], min(found.values())
    for tile in sorted(found, key=lambda tile: found[tile]):
        print(f"  {key} {tile}: {1e6 * found[tile]:.1f} us", flush=True)
    stored = sum(weight_bytes(layer) for layer in layers)
    operations = 2 * rows * sum(out * width for out, width in shapes)
    return {
        "tile": (f"{best.outputs} {best.other} {best.warps} {best.stages}", ""),
        "products of a layer": (f"{1e6 * seconds:.1f}", "us"),
        "weights read": (f"{stored / seconds / 1e12:.2f}", "TB/s"),
        "operations": (f"{operations / seconds / 1e12:.1f}", "TOP/s"),
    }


def _compile_all(key: Key, tiles: Sequence[Tile], layer: PackedLinear, x: Tensor) -> None:
    """Compiles a product for all tiles at once, one thread each."""
    grid = input_grid(layer, x)
    q, sums = triton_inputs.quantize(x, grid, input_layout(layer))

    def build(tile: Tile) -> None:
        with suppress(Exception), torch.cuda.stream(torch.cuda.Stream()):
            TRITON.multiply(layer, q, sums, grid, x.dtype, None, tile)

    build(TILES[key])  # makes what the layer keeps, before the threads need it
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(build, tiles))
    torch.cuda.synchronize()


def _device_seconds(bench: Bench, calls: Sequence[Callable[[], object]], loops: int = 10) -> float:
    """Returns the seconds of calls, one after another in a graph.

    Together, the weights that they read exceed the card's cache.
    """
    loops = loops if bench.gpu else 1

    def run() -> None:
        for _ in range(loops):
            for call in calls:
                call()

    return bench.seconds(bench.graph(run), 3 if bench.gpu else 1) / loops

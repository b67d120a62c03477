"""How Triton's products are launched: their tiles, and whether launches overlap."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qvlm.packing.kernels.triton_kernels import jit, tl

# Whether a launch may begin before the previous one has ended (programmatic dependent launch). It
# fetches weights until the output of the previous launch is complete.
OVERLAP = True


@dataclass(frozen=True)
class Tile:
    """Sizes of one program of a product.

    Attributes:
        outputs: Number of outputs of a tile.
        other: Number of chunks that are loaded together (few rows), or of rows of a tile (many
            rows).
        warps: Number of warps, of 32 threads each.
        stages: Depth of the software pipeline.
    """

    outputs: int
    other: int
    warps: int
    stages: int


# Tiles by product, bits of the weight and largest number of rows. `make gpu` chose them on the card
# that results/gpu.md names.
TILES: dict[tuple[str, int, int], Tile] = {
    ("few", 4, 4): Tile(2, 16, 1, 1),
    ("few", 8, 4): Tile(2, 8, 2, 1),
    ("many", 4, 16): Tile(32, 16, 4, 4),
    ("many", 8, 16): Tile(32, 16, 2, 6),
    ("many", 4, 2**31): Tile(128, 64, 4, 3),
    ("many", 8, 2**31): Tile(64, 128, 4, 4),
    ("float_few", 4, 4): Tile(2, 8, 1, 1),
}


def tile(product: str, bits: int, rows: int) -> Tile:
    """Returns the tile for a product of a weight of `bits` with an input of `rows` rows."""
    return next(
        chosen
        for (name, width, most), chosen in TILES.items()
        if (name, width) == (product, bits) and rows <= most
    )


def overlapping(device: torch.device) -> dict[str, Any]:
    """Returns the options of a launch that say whether it overlaps with the previous one."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"OVERLAP": True, "launch_pdl": True} if able and OVERLAP else {"OVERLAP": False}


@jit
def wait(OVERLAP: tl.constexpr):
    """Lets the next launch begin, and waits for the output of the previous one."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

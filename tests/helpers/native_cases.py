"""Integer products of any shape and bit width, and the bits that they must have."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qvlm.packing.formats import pack
from qvlm.packing.kernels.native_library import Weight

BITS = [(4, 4), (8, 8), (6, 6), (4, 8), (3, 2), (7, 7), (7, 8), (2, 8), (5, 5), (8, 4)]
# Rows, outputs, channels and channels of a group.
SHAPES = [
    (3, 70, 1100, 1100),
    (9, 5, 24, 8),
    (5, 70, 600, 120),
    (1, 7, 1290, 640),
    (1, 14, 768, 128),
    (1, 9, 1200, 120),
    (2, 3, 203, 203),
]
MAX_RUN = 512  # of native_types.h


@dataclass
class IntegerCase:
    """A product and its operands.

    Attributes:
        codes: Codes of the weight, [out, in] uint8.
        zero, weight_scale: Parameters of the groups of the weight, [out, groups].
        x: Input, [rows, in].
        scale, zero_point: Grid of the input: one number, [rows, 1] or [in].
    """

    bits: tuple[int, int]
    group: int
    codes: Tensor
    zero: Tensor
    weight_scale: Tensor
    x: Tensor
    scale: Tensor
    zero_point: Tensor

    def weight(self) -> Weight:
        packed = pack(self.codes, self.bits[0])
        made = Weight(packed, self.codes.shape[1], self.bits[0], self.group)
        return made.uniform(self.weight_scale, self.zero)

    def expected(self) -> Tensor:
        """Sums of t v s in int64 over each run, and run by run in the type of the output."""
        dtype = torch.float32 if self.x.dtype == torch.bfloat16 else torch.float64
        steps = (self.x.float() / self.scale).round()
        steps = torch.maximum(steps, -self.zero_point)
        steps = torch.minimum(steps, 2 ** self.bits[1] - 1 - self.zero_point).long()
        width = self.codes.shape[1]
        y = torch.zeros(len(self.x), len(self.codes), dtype=dtype)
        for group, start in enumerate(range(0, width, self.group)):
            v = self.codes[:, start : start + self.group].long() - self.zero[:, group, None].long()
            t = steps[:, start : start + self.group]
            for begin in range(0, v.shape[1], MAX_RUN):
                run = slice(begin, begin + MAX_RUN)
                exact = t[:, run] @ v[:, run].T
                y += exact.to(dtype) * self.weight_scale[:, group].to(dtype)
        return y


def integer_case(
    bits: tuple[int, int],
    shape: tuple[int, int, int, int],
    grid: str,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> IntegerCase:
    """Makes a case of random operands, some of them beyond the grid of the input.

    Args:
        shape: Rows, outputs, channels and channels of a group.
        grid: "tensor", "token" or "channel", which share scale and zero point.
    """
    rows, out, width, group = shape
    generator = torch.Generator().manual_seed(seed)
    groups = -(-width // group)
    parameters = {"tensor": (), "token": (rows, 1), "channel": (width,)}[grid]
    codes = torch.randint(2 ** bits[0], (out, width), generator=generator).to(torch.uint8)
    zero = torch.randint(2 ** bits[0], (out, groups), generator=generator).to(torch.uint8)
    zero_point = torch.randint(2 ** bits[1], parameters, generator=generator).float()
    scale = torch.rand(parameters, generator=generator) + 0.5
    codes_of_x = torch.randint(-2, 2 ** bits[1] + 2, (rows, width), generator=generator)
    x = ((codes_of_x - zero_point) * scale).to(dtype)
    weight_scale = torch.rand(out, groups, generator=generator)
    return IntegerCase(bits, group, codes, zero, weight_scale, x, scale, zero_point)


def integer_cases(bits: tuple[int, int]) -> Iterator[IntegerCase]:
    """Yields cases of all shapes and grids, in float32 and bf16."""
    for seed, shape in enumerate(SHAPES):
        for grid in ("tensor", "token", "channel"):
            for dtype in (torch.float32, torch.bfloat16):
                yield integer_case(bits, shape, grid, seed, dtype)

"""How a quantized weight is stored, in the same terms for every format."""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from qvlm.errors import UserError
from qvlm.packing.formats import unpack


class UnreadableError(Exception):
    """The tensors of a layer are incomplete or do not fit each other; says which and why."""


@dataclass(frozen=True)
class StoredWeight:
    """The weight of one layer. A value is `level[code] * scale + minimum`.

    The level of a code is `levels[code]`, or code minus zero point where `levels` is None.

    Attributes:
        shape: Shape of the weight, [out, in], or [experts, out, in] of fused experts.
        bits: Bits that a code takes in the file.
        claimed_bits: Bits that the checkpoint says the weight has.
        codes: Integers from 0, [scales, members] uint8: a row holds all codes that share a scale.
        scale: Scale of each row, [scales], in the type in which it is stored.
        zero_point: Zero point of each row, [scales], or None for a fixed one.
        fixed_zero: The zero point of all rows where there is no tensor of them.
        levels: Value of each code, [codes], or None for evenly spaced ones.
        minimum: Float that is added to the values of each row, [scales], or None.
        outer: Stored floats that the scales are products of, where scales are quantized too.
        signed: Whether the format knows negative scales.
        unpacked: Whether the format stores codes of fewer bits in whole bytes.
        input_scale: Static scales of the layer's input, or None.
    """

    shape: tuple[int, ...]
    bits: int
    claimed_bits: int
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    fixed_zero: int = 0
    levels: Tensor | None = None
    minimum: Tensor | None = None
    outer: Tensor | None = None
    signed: bool = False
    unpacked: bool = False
    input_scale: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @cached_property
    def histogram(self) -> Tensor:
        """How often each code occurs, [256]."""
        found = torch.zeros(256, dtype=torch.long)
        for part in self.codes.flatten().split(2**24):
            found += torch.bincount(part.int(), minlength=256)
        return found

    @cached_property
    def varied(self) -> Tensor:
        """Whether the codes of each row differ, [scales]."""
        return self.codes.amin(1) != self.codes.amax(1)


def by_scale(codes: Tensor, scale: Tensor) -> Tensor:
    """Brings the codes of a weight into rows that share a scale.

    A scale belongs to a rectangle of neighbors: to the whole weight, a row, a group of a row or a
    block. At the edges the last code is repeated, which changes no set of codes.

    Args:
        codes: Codes [out, in].
        scale: Scales [rows, groups], fewer than or as many as the codes.

    Returns:
        Codes [rows * groups, members].

    Raises:
        UnreadableError: If the scales cannot belong to such rectangles.
    """
    if scale.ndim != 2 or not scale.numel():
        raise UnreadableError(f"its scales have shape {shown(scale)}")
    tall, wide = (-(-size // count) for size, count in zip(codes.shape, scale.shape, strict=True))
    for size, count, length in zip(codes.shape, scale.shape, (tall, wide), strict=True):
        if count > size or (count - 1) * length >= size:
            raise UnreadableError(f"scales of {shown(scale)} do not fit codes of {shown(codes)}")
    down = tall * scale.shape[0] - codes.shape[0]
    right = wide * scale.shape[1] - codes.shape[1]
    if down or right:
        codes = F.pad(codes[None].float(), (0, right, 0, down), "replicate")[0].to(torch.uint8)
    blocks = codes.view(scale.shape[0], tall, scale.shape[1], wide).transpose(1, 2)
    return blocks.reshape(scale.numel(), -1)


def unpacked(packed: Tensor, bits: int, count: int, what: str) -> Tensor:
    """Returns the codes of a packed tensor whose rows are streams of bits, lowest bit first.

    Args:
        packed: Packed codes, [rows, words] of any type of integer.
        bits: Bits of a code.
        count: Number of codes in a row.
        what: Name of the tensor, for messages.

    Raises:
        UnreadableError: If a row is not as long as its codes need.
    """
    if packed.ndim != 2 or packed.is_floating_point():
        raise UnreadableError(f"{what} is {packed.dtype} of shape {shown(packed)}")
    rows = packed.contiguous().view(torch.uint8)
    unit = packed.element_size()
    needed = -(-count * bits // (8 * unit)) * unit
    if rows.shape[-1] != needed:
        raise UnreadableError(
            f"{what} has rows of {rows.shape[-1]} bytes, and {count} codes of {bits} bits take "
            f"{needed}"
        )
    try:
        return unpack(rows[:, : -(-count * bits // 8)], bits, count)
    except UserError as error:
        raise UnreadableError(f"its bits are not read: {error}") from error


def require_groups(scale: Tensor, width: int, group_size: int | None) -> None:
    """Compares scales [rows, groups] with the group size that the checkpoint states.

    Args:
        scale: Scales of a weight.
        width: Number of inputs of the weight.
        group_size: Neighbors along the input that share a scale; None or -1 stands for all.

    Raises:
        UnreadableError: If the scales are of other groups.
    """
    size = group_size if group_size and group_size > 0 else width
    if scale.ndim != 2 or scale.shape[1] != -(-width // size):
        raise UnreadableError(
            f"groups of {size} are claimed, and scales of shape {shown(scale)} for {width} inputs "
            "are stored"
        )


def shown(tensor: Tensor) -> str:
    """The shape of a tensor for messages, such as 32 x 64."""
    return " x ".join(map(str, tensor.shape)) or "a single number"

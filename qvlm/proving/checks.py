"""What the codes and scales of one layer say about themselves.

A scale that is wrong by a factor, or that belongs to another layer, looks like any other. Only what
no quantizer would write is named here, so that a sound checkpoint gives no alarm.
"""

from dataclasses import dataclass
from math import ceil, log2

import torch
from torch import Tensor

from qvlm.proving.stored import StoredWeight

# Rows whose codes are counted one by one, which bounds the cost.
_MOST_ROWS = 4096
# Scales that cannot be alike by chance, and weights for each code that show most of the codes.
ENOUGH_SCALES = 8
_ENOUGH_CODES = 4
# Numbers of float16 below this have less than four significant bits. Sound checkpoints have
# subnormal scales in float16, because weights of 0.005 in 8 bits need them.
_FEW_DIGITS = 2.0**-21


@dataclass(frozen=True)
class Counted:
    """Values that the codes of a layer take.

    Attributes:
        values: Number of distinct codes in the whole layer.
        per_scale: Largest number of distinct codes that share a scale.
    """

    values: int
    per_scale: int

    @property
    def bits(self) -> int:
        """Bits that as many values need."""
        return ceil(log2(max(self.values, 2)))


def counted(weight: StoredWeight) -> Counted:
    """Counts the distinct codes of a layer."""
    return Counted(int((weight.histogram > 0).sum()), int(_distinct(_sample(weight)).max()))


def faults(weight: StoredWeight, found: Counted) -> list[str]:
    """Returns what is wrong with a layer, a sentence each; an empty list if nothing is.

    Args:
        weight: Weight of the layer.
        found: Result of `counted`.
    """
    return [
        *_bits(weight, found),
        *_scales(weight),
        *_zero_points(weight),
        *_constant(weight, found),
        *_levels(weight),
        *_inputs(weight),
    ]


def empty_groups(weight: StoredWeight) -> int:
    """Returns the number of scales that are zero above weights that are zero as well."""
    zero = _checked(weight) == 0
    return int((zero & ~_varied(weight, len(zero))).sum())


def _bits(weight: StoredWeight, found: Counted) -> list[str]:
    claimed, stored = weight.claimed_bits, weight.bits
    if stored != claimed and not weight.unpacked:
        return [f"its codes take {stored} bits, and {claimed} are claimed"]
    if found.values > 2**claimed or (weight.levels is None and _width(weight) > 2**claimed):
        return [f"its codes take {found.values} values, which {claimed} bits cannot hold"]
    if found.values <= _fewest(weight) and weight.count >= _ENOUGH_CODES * 2**claimed:
        needed = f"{found.bits} bits hold" if found.values > 1 else "no bits are needed for"
        return [f"its codes take {found.values} values, which {needed}, and {claimed} are claimed"]
    return []


def _fewest(weight: StoredWeight) -> int:
    """Number of values that a layer of its bits is bound to exceed.

    Where few weights share a scale, each scale brings out the ends of the codes. One scale for a
    whole weight with an outlier leaves many codes unused, and so do floats of 8 bits.
    """
    many = len(weight.scale) >= ENOUGH_SCALES
    plain = weight.levels is None or len(weight.levels) <= 2**4
    return 2 ** (weight.claimed_bits - 1 if many and plain else weight.claimed_bits // 2)


def _width(weight: StoredWeight) -> int:
    """Number of integers from the lowest to the highest code."""
    used = weight.histogram.nonzero()
    return int(used.max() - used.min()) + 1


def _scales(weight: StoredWeight) -> list[str]:
    scale = _checked(weight)
    number, varied = scale.float(), _varied(weight, len(scale))
    smallest = _FEW_DIGITS if scale.dtype == torch.float16 else torch.finfo(scale.dtype).tiny
    size = scale.double().abs()
    bad = {
        "not a number": number.isnan(),
        "infinite": number.isinf(),
        "zero, although the codes differ": (number == 0) & varied,
        "subnormal": (size > 0) & (size < smallest) & varied,
        "negative": (number < 0) & (not weight.signed),
    }
    said = [_share(int(mask.sum()), len(scale), what) for what, mask in bad.items() if mask.any()]
    if weight.outer is None and len(scale) >= ENOUGH_SCALES and bool((scale == scale[0]).all()):
        said.append(f"all its {len(scale)} scales are {float(number[0]):.3g}: not calibrated")
    if len(scale) == 1 and float(number[0]) == 1:
        said.append("its only scale is 1: not calibrated")
    if weight.minimum is not None and not bool(weight.minimum.isfinite().all()):
        said.append("some of its minima are not finite")
    return said


def _zero_points(weight: StoredWeight) -> list[str]:
    zero = weight.zero_point
    if zero is None:
        return []
    low, high = (128 - 2 ** (weight.claimed_bits - 1),) * 2 if weight.unpacked else (0, 0)
    high += 2**weight.claimed_bits - 1
    outside = ~((zero >= low) & (zero <= high))
    if not outside.any():
        return []
    return [_share(int(outside.sum()), len(zero), "out of range", "zero points")]


def _constant(weight: StoredWeight, found: Counted) -> list[str]:
    if found.values == 1:
        return ["all its codes are equal"]
    alike = ~_varied(weight, len(weight.scale)) & (weight.scale != 0)
    if weight.codes.shape[1] >= ENOUGH_SCALES and int(alike.sum()) * 2 > len(alike):
        return [_share(int(alike.sum()), len(alike), "above equal codes")]
    return []


def _levels(weight: StoredWeight) -> list[str]:
    if weight.levels is None:
        return []
    used = weight.levels[weight.histogram[: len(weight.levels)] > 0]
    return [] if bool(used.isfinite().all()) else ["some of its codes are NaN"]


def _inputs(weight: StoredWeight) -> list[str]:
    scale = weight.input_scale
    if scale is None or not scale.numel():
        return []
    number = scale.float().flatten()
    if not bool((number.isfinite() & (number >= torch.finfo(torch.float32).tiny)).all()):
        return ["the scale of its input is zero, subnormal, negative or not finite"]
    if bool((number == 1).all()):
        return ["the scale of its input is 1: not calibrated"]
    return []


def _checked(weight: StoredWeight) -> Tensor:
    """The scales that are stored as floats, [n]."""
    return (weight.scale if weight.outer is None else weight.outer).flatten()


def _varied(weight: StoredWeight, count: int) -> Tensor:
    """Whether the codes below each of `count` scales differ, [count]."""
    rows = weight.varied
    size = -(-len(rows) // count)
    padded = torch.cat([rows, rows.new_zeros(size * count - len(rows))])
    return padded.view(count, size).any(1)


def _sample(weight: StoredWeight) -> Tensor:
    codes = weight.codes
    if len(codes) <= _MOST_ROWS:
        return codes
    return codes[torch.linspace(0, len(codes) - 1, _MOST_ROWS).long()]


def _distinct(codes: Tensor) -> Tensor:
    """The number of distinct codes in each row."""
    ordered = codes.sort(1).values
    return 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)


def _share(count: int, of: int, what: str, things: str = "scales") -> str:
    return f"{count} of its {of} {things} are {what}"

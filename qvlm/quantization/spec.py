"""What a user may ask of a quantizer, checked when it is asked.

A `QuantSpec` is one kind of tensor, a `QuantizationConfig` the whole model. Both are plain values:
they can be written to a record and compared.
"""

from dataclasses import dataclass

from qvlm.errors import UserError

ACTIVATION_GRANULARITIES = ("per_tensor", "per_token", "per_channel", "per_channel_group")
WEIGHT_GRANULARITIES = ("per_tensor", "per_channel", "per_group")
RANGES = ("lp", "minmax")


@dataclass(frozen=True)
class QuantSpec:
    """How one kind of tensor is quantized.

    Args:
        bits: 2 to 8.
        granularity: what shares a scale. Activations [tokens, features]: `per_tensor`,
            `per_token` (dynamic), `per_channel` (a feature), `per_channel_group` (clusters of
            `group_size` range-sorted features). Weights [out, in]: `per_tensor`, `per_channel`
            (an output row), `per_group` (`group_size` neighbours along the input, or along its
            clusters: see `ranges.grouping_order`).
        group_size: elements of a group, channels of a cluster.
        p: exponent of the distance |x - x_hat|^p that `lp` ranges minimise.
        ranges: "lp" (clipped to the least lp distance) or "minmax".

    Raises:
        UserError: naming the field and what it accepts.
    """

    bits: int
    granularity: str
    group_size: int = 128
    p: float = 2
    ranges: str = "lp"

    def __post_init__(self) -> None:
        known = dict.fromkeys(ACTIVATION_GRANULARITIES + WEIGHT_GRANULARITIES)
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise UserError(f"bits={self.bits!r}: accepted are whole numbers from 2 to 8")
        if self.granularity not in known:
            raise UserError(f"granularity={self.granularity!r}: accepted are {', '.join(known)}")
        if not isinstance(self.group_size, int) or self.group_size < 1:
            raise UserError(f"group_size={self.group_size!r}: accepted are whole numbers from 1")
        if not 0 < self.p < float("inf"):
            raise UserError(f"p={self.p!r}: accepted are finite numbers above 0")
        if self.ranges not in RANGES:
            raise UserError(f"ranges={self.ranges!r}: accepted are {', '.join(RANGES)}")


@dataclass(frozen=True)
class QuantizationConfig:
    """Which `QuantSpec` goes where.

    Args:
        weight: of every quantized linear.
        language: activations of the decoder layers and of the projector, which the released code
            quantizes together with the language model.
        vision: activations of the vision tower.
        vision_tower: whether the vision tower is quantized at all.

    Raises:
        UserError: if a granularity does not fit weights or activations.
    """

    weight: QuantSpec
    language: QuantSpec
    vision: QuantSpec
    vision_tower: bool = True

    def __post_init__(self) -> None:
        for name, accepted in (
            ("weight", WEIGHT_GRANULARITIES),
            ("language", ACTIVATION_GRANULARITIES),
            ("vision", ACTIVATION_GRANULARITIES),
        ):
            granularity = getattr(self, name).granularity
            if granularity not in accepted:
                raise UserError(
                    f"{name} granularity={granularity!r}: accepted are {', '.join(accepted)}"
                )

    def activation(self, kind: str) -> QuantSpec:
        """The activation spec of a block kind: "vision", "projector" or "language"."""
        return self.vision if kind == "vision" else self.language

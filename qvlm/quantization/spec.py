"""The options of a quantizer, checked when they are given.

A `QuantSpec` describes one kind of tensor and a `QuantizationConfig` the whole model. Both are
plain values: they can be compared and written to a record.
"""

from dataclasses import dataclass

from qvlm import validation
from qvlm.bits import MAX_BITS, MIN_BITS

ACTIVATION_GRANULARITIES = ("per_tensor", "per_token", "per_channel", "per_channel_group")
WEIGHT_GRANULARITIES = ("per_tensor", "per_channel", "per_group")
RANGES = ("lp", "minmax")


@dataclass(frozen=True)
class QuantSpec:
    """How one kind of tensor is quantized.

    Args:
        bits: Number of bits, 2 to 8.
        granularity: Elements that share a scale. For activations [tokens, features]: `per_tensor`,
            `per_token` (dynamic), `per_channel` (a feature) or `per_channel_group` (clusters of
            `group_size` features, sorted by range). For weights [out, in]: `per_tensor`,
            `per_channel` (an output row) or `per_group` (`group_size` neighbors along the input, or
            along its clusters: see `ranges.grouping_order`).
        group_size: Number of elements of a group, or of channels of a cluster.
        p: Exponent of the error |x - x_hat|^p that the `lp` estimator minimizes, 0.1 to 10. Beyond
            that, powers of errors leave the range of floating point and all ranges look alike.
        ranges: Range estimator, "lp" (`ranges.mse`) or "minmax".

    Raises:
        UserError: If a field has a value that is not accepted; the message names both.
    """

    bits: int
    granularity: str
    group_size: int = 128
    p: float = 2
    ranges: str = "lp"

    def __post_init__(self) -> None:
        known = dict.fromkeys(ACTIVATION_GRANULARITIES + WEIGHT_GRANULARITIES)
        validation.whole_number("bits", self.bits, MIN_BITS, MAX_BITS)
        validation.one_of("granularity", self.granularity, known)
        validation.whole_number("group_size", self.group_size)
        validation.number("p", self.p, 0.1, 10)
        validation.one_of("ranges", self.ranges, RANGES)


@dataclass(frozen=True)
class QuantizationConfig:
    """The `QuantSpec` of each kind of tensor.

    Args:
        weight: Spec of the weight of every quantized linear.
        language: Spec of the activations of the decoder layers and of the projector, which the
            released code of Q-VLM quantizes together with the language model.
        vision: Spec of the activations of the vision tower.
        vision_tower: Whether the vision tower is quantized at all.

    Raises:
        UserError: If a granularity does not fit weights or activations.
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
            validation.one_of(f"{name} granularity", getattr(self, name).granularity, accepted)

    def activation(self, kind: str) -> QuantSpec:
        """The activation spec of a kind of block: "vision", "projector" or "language"."""
        return self.vision if kind == "vision" else self.language

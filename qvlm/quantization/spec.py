"""The options of a quantizer, checked when they are given.

A `QuantSpec` describes one kind of tensor and a `QuantizationConfig` the whole model. Both are
plain values: they can be compared and written to a record.
"""

from dataclasses import dataclass, replace

from qvlm import validation
from qvlm.bits import MAX_BITS, MIN_BITS
from qvlm.errors import UserError

ACTIVATION_GRANULARITIES = (
    *("per_tensor", "per_token", "per_channel", "per_channel_group"),
    *("per_channel_prompt", "per_position"),
)
FIRST_TOKEN = ("quantized", "float")
WEIGHT_GRANULARITIES = ("per_tensor", "per_channel", "per_group")
RANGES = ("lp", "minmax")
SMALLEST_GROUP, LARGEST_GROUP = 16, 128


@dataclass(frozen=True)
class QuantSpec:
    """How one kind of tensor is quantized.

    Args:
        bits: Number of bits, 2 to 8.
        granularity: Elements that share a scale. For activations [tokens, features]: `per_tensor`,
            `per_token` (dynamic), `per_channel` (a feature), `per_channel_group` (clusters of
            `group_size` features, sorted by range), `per_channel_prompt` (dynamic: see
            `prompt_quantizer`), or `per_position` (static: see `position_quantizer`). For weights
            [out, in]: `per_tensor`, `per_channel` (an output row) or `per_group` (`group_size`
            neighbors along the input, or along its clusters: see `ranges.grouping_order`).
        group_size: Number of elements of a group, or of channels of a cluster. None is the largest
            divisor of a layer's input up to `LARGEST_GROUP`; see `largest_divisor`.
        p: Exponent of the error |x - x_hat|^p that the `lp` estimator minimizes, 0.1 to 10. Beyond
            that, powers of errors leave the range of floating point and all ranges look alike.
        ranges: Range estimator, "lp" (`ranges.mse`) or "minmax".
        static_width: Only with `per_channel_prompt`, the number of features of the inputs that have
            static scales per channel, unless they are inputs of o_proj. None is none.
        positions: Only with `per_position`, the number of tokens of every sequence. None is not
            known yet; a block of a walk knows it.

    Raises:
        UserError: If a field has a value that is not accepted; the message names both.
    """

    bits: int
    granularity: str
    group_size: int | None = 128
    p: float = 2
    ranges: str = "lp"
    static_width: int | None = None
    positions: int | None = None

    def __post_init__(self) -> None:
        known = dict.fromkeys(ACTIVATION_GRANULARITIES + WEIGHT_GRANULARITIES)
        validation.whole_number("bits", self.bits, MIN_BITS, MAX_BITS)
        validation.one_of("granularity", self.granularity, known)
        if self.group_size is not None:
            validation.whole_number("group_size", self.group_size)
        validation.number("p", self.p, 0.1, 10)
        validation.one_of("ranges", self.ranges, RANGES)
        if self.static_width is not None:
            validation.whole_number("static_width", self.static_width)

    def for_layer(self, name: str, width: int) -> "QuantSpec":
        """Returns the spec of the input of one layer.

        Args:
            name: Name of the layer.
            width: Number of its inputs.
        """
        static = self.static_width == width and name.rpartition(".")[2] != "o_proj"
        if self.granularity == "per_channel_prompt" and static:
            return replace(self, granularity="per_channel").for_width(width)
        return self.for_width(width)

    def for_width(self, width: int) -> "QuantSpec":
        """Returns the spec for a layer with `width` inputs, with a number as group size."""
        if self.group_size is not None:
            return self
        return replace(self, group_size=largest_divisor(width))

    @property
    def group(self) -> int:
        """The group size of a spec that has a number.

        Raises:
            ValueError: If the group size is None, which depends on the layer (`for_width`).
        """
        if self.group_size is None:
            raise ValueError("the group size depends on the width of a layer")
        return self.group_size


def largest_divisor(width: int) -> int:
    """Returns the largest divisor of `width` up to `LARGEST_GROUP`, such as 96 for 576.

    A width without one from `SMALLEST_GROUP` on, such as a prime, is a group of its own: scales of
    a few elements each would take more memory than their codes and leave hardly any error.
    """
    sizes = range(min(LARGEST_GROUP, width), SMALLEST_GROUP - 1, -1)
    return next((size for size in sizes if width % size == 0), width)


@dataclass(frozen=True)
class QuantizationConfig:
    """The `QuantSpec` of each kind of tensor.

    Args:
        weight: Spec of the weights of decoder layers and projector.
        language: Spec of the activations of the decoder layers and of the projector, which the
            released code of Q-VLM quantizes together with the language model.
        vision: Spec of the activations of the vision tower.
        vision_tower: Whether the vision tower is quantized at all.
        vision_weight: Spec of the weights of the vision tower. None is that of the other weights.
        first_token: "quantized", or "float" to leave the inputs of the decoder's linears in
            floating point at the first position (see `first_token`).

    Raises:
        UserError: If a granularity does not fit weights or activations.
    """

    weight: QuantSpec
    language: QuantSpec
    vision: QuantSpec
    vision_tower: bool = True
    vision_weight: QuantSpec | None = None
    first_token: str = "quantized"

    def __post_init__(self) -> None:
        for name, accepted in (
            ("weight", WEIGHT_GRANULARITIES),
            ("language", ACTIVATION_GRANULARITIES),
            ("vision", ACTIVATION_GRANULARITIES),
            ("vision_weight", WEIGHT_GRANULARITIES),
        ):
            spec = getattr(self, name)
            if spec is not None:
                validation.one_of(f"{name} granularity", spec.granularity, accepted)
        validation.one_of("first_token", self.first_token, FIRST_TOKEN)
        if self.first_token != "quantized" and self.language.granularity == "per_channel_prompt":
            raise UserError(
                "first_token=float is not possible with granularity=per_channel_prompt, whose "
                "ranges contain every token. Give first_token=quantized."
            )
        if self.language.granularity == "per_position":
            raise UserError(
                "granularity=per_position is for the vision tower, which reads as many tokens of "
                "every image. Give quantizer.language.granularity one of: "
                + ", ".join(name for name in ACTIVATION_GRANULARITIES if name != "per_position")
            )

    def weights(self, kind: str) -> QuantSpec:
        """The weight spec of a kind of block: "vision", "projector" or "language"."""
        return (self.vision_weight or self.weight) if kind == "vision" else self.weight

    def activation(self, kind: str) -> QuantSpec:
        """The activation spec of a kind of block: "vision", "projector" or "language"."""
        return self.vision if kind == "vision" else self.language

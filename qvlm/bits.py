"""The bit widths of a cell: of its weights and of its activations."""

from dataclasses import dataclass

from qvlm.errors import UserError
from qvlm.validation import whole_number

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class BitWidths:
    """Bits per weight and bits per activation. Both are None in full precision.

    Attributes:
        weights: Bits per weight, from 2 to 8.
        activations: Bits per activation, from 2 to 8.

    Raises:
        UserError: if only one of the two is given, or one is out of range.
    """

    weights: int | None = None
    activations: int | None = None

    def __post_init__(self) -> None:
        if (self.weights is None) != (self.activations is None):
            missing = "bits.weights" if self.weights is None else "bits.activations"
            raise UserError(
                f"{missing}=null is not possible beside a quantized tensor: bits.weights and "
                "bits.activations are both null (full precision), or both whole numbers from "
                f"{MIN_BITS} to {MAX_BITS}."
            )
        if self.weights is not None:
            whole_number("bits.weights", self.weights, MIN_BITS, MAX_BITS)
            whole_number("bits.activations", self.activations, MIN_BITS, MAX_BITS)

    @property
    def is_full_precision(self) -> bool:
        """Whether nothing is quantized."""
        return self.weights is None

    @property
    def label(self) -> str:
        """The name in tables: "FP", "W4A4", ..."""
        return "FP" if self.weights is None else f"W{self.weights}A{self.activations}"

    def __str__(self) -> str:
        return self.label

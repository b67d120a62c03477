"""The proof of bits of a record, as a strip with a bar per layer."""

from collections.abc import Sequence
from dataclasses import dataclass

from qvlm.records.record import Record


@dataclass(frozen=True)
class Strip:
    """The proof of bits of one record, layer by layer.

    Attributes:
        number: Number of the record.
        title: The cell in words.
        layers: Per layer whether it holds, and a sentence.
    """

    number: int
    title: str
    layers: Sequence[tuple[bool, str]]

    @property
    def failed(self) -> list[str]:
        """Sentences of the layers that do not hold."""
        return [sentence for holds, sentence in self.layers if not holds]


def strip(record: Record, number: int, title: str) -> Strip:
    """Returns the strip of a record, of which the page knows number and title."""
    layers = []
    for row in record.layers:
        held, parts = True, []
        for part, bits, levels in (
            ("weight", row.get("w_bits"), row.get("weight_levels")),
            ("input", row.get("a_bits"), row.get("input_levels")),
        ):
            if bits is None or levels is None:
                continue
            held &= 1 <= levels <= 2**bits
            parts.append(f"{levels} of {2**bits} {part} values per scale")
        layers.append((held, f"{row['layer']}: {', '.join(parts)}"))
    return Strip(number, title, layers)

"""Bit widths: what they are called, and which there are."""

from dataclasses import FrozenInstanceError

import pytest

from qvlm.bits import BitWidths
from qvlm.errors import UserError


def test_labels() -> None:
    assert BitWidths(4, 8).label == str(BitWidths(4, 8)) == "W4A8"
    assert BitWidths().label == "FP"
    assert BitWidths().is_full_precision
    assert not BitWidths(8, 8).is_full_precision


@pytest.mark.parametrize(
    ("weights", "activations", "sentence"),
    [
        (1, 4, "bits.weights=1 is not a whole number from 2 to 8."),
        (4, 9, "bits.activations=9 is not a whole number from 2 to 8."),
        (None, 4, "bits.weights=null is not possible"),
        (4, None, "bits.activations=null is not possible"),
        (True, 4, "bits.weights=true is not a whole number"),
    ],
)
def test_other_widths_are_refused(weights: int, activations: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        BitWidths(weights, activations)


def test_a_pair_of_widths_is_a_value() -> None:
    widths = BitWidths(4, 4)
    assert len({widths, BitWidths(4, 4), BitWidths(4, 8)}) == 2
    with pytest.raises(FrozenInstanceError):
        widths.weights = 8  # type: ignore[misc]

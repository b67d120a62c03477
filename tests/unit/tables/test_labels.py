"""Rows follow the paper's order, whatever the number of digits of a bit width."""

from qvlm.bits import BitWidths
from qvlm.tables.labels import CDM, QVLM, bits_order, is_part_of_qvlm, method_order


def test_bit_widths_go_from_full_precision_to_narrow() -> None:
    widths = [BitWidths(2, 4), BitWidths(4, 4), BitWidths(8, 8), BitWidths(4, 8), BitWidths()]
    labels = [str(bits) for bits in sorted(widths, key=bits_order)]
    assert labels == ["FP", "W8A8", "W4A8", "W4A4", "W2A4"]


def test_methods_go_from_controls_to_qvlm() -> None:
    methods = [QVLM, "Zebra", "QLoRA", "RTN", "FP"]
    assert sorted(methods, key=method_order) == ["FP", "RTN", "QLoRA", "Zebra", QVLM]


def test_a_part_of_qvlm_is_not_qvlm() -> None:
    assert is_part_of_qvlm(CDM)
    assert not is_part_of_qvlm(QVLM)

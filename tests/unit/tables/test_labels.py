"""Rows follow the paper's order, whatever the number of digits of a bit width."""

from qvlm.bits import BitWidths
from qvlm.tables.labels import CDM, QVLM, bits_order, is_ours, is_part_of_qvlm, method_order


def test_bit_widths_go_from_full_precision_to_narrow() -> None:
    widths = [BitWidths(2, 4), BitWidths(4, 4), BitWidths(8, 8), BitWidths(4, 8), BitWidths()]
    labels = [str(bits) for bits in sorted(widths, key=bits_order)]
    assert labels == ["FP", "W8A8", "W4A8", "W4A4", "W2A4"]


def test_methods_go_from_controls_over_the_papers_to_ours() -> None:
    methods = ["RoCo, per token", "Zebra", QVLM, "RoCo", "QLoRA", "RTN", "FP"]
    papers = ["FP", "RTN", "QLoRA", QVLM]
    assert sorted(methods, key=method_order) == [*papers, "Zebra", "RoCo", "RoCo, per token"]


def test_a_form_of_our_method_is_ours() -> None:
    assert is_ours("RoCo") and is_ours("RoCo, per token")
    assert not is_ours("RoCoco") and not is_ours(QVLM)


def test_a_part_of_qvlm_is_not_qvlm() -> None:
    assert is_part_of_qvlm(CDM)
    assert not is_part_of_qvlm(QVLM)

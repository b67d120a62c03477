"""Evenly spaced rows: ascending, without repetition, and the ends among them."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from qvlm.quantization.sampling import evenly_spaced


@given(st.integers(0, 5000), st.integers(1, 5000))
def test_rows_are_spread_over_the_whole_length(length: int, count: int) -> None:
    rows = evenly_spaced(length, count)
    assert rows.dtype == torch.int64 and len(rows) == min(length, count)
    if length <= count:
        assert rows.tolist() == list(range(length))
    elif count > 1:
        assert rows[0] == 0 and rows[-1] == length - 1
        gaps = rows.diff()
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1

"""The kernel `int_mm`: sums over scale runs are exact at every bit width."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvlm.packing.kernels.int_mm import int_products, scale_runs
from qvlm.packing.layer import PackedLinear
from tests.helpers.layers import INPUTS, quantized


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_sums_of_integers_are_exact(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([(4, 4), (4, 8), (8, 4), (8, 8), (6, 6), (7, 7)]))
    inputs = data.draw(st.sampled_from(INPUTS))
    seed, ordered = data.draw(st.integers(0, 99)), data.draw(st.booleans())
    layer, _ = quantized((9, 96), bits, "per_group", inputs, 32, seed=seed, ordered=ordered)
    packed = PackedLinear.from_quantized(layer)
    x = torch.randn(data.draw(st.sampled_from([1, 6])), 96) * 2
    # Scale runs are of channels as they are stored.
    order = packed.channels()
    steps, _, zero_point = packed.input_steps(x)
    steps, codes = steps[:, order], packed.weight_codes()[:, order]
    if zero_point.shape == (96,):
        zero_point = zero_point[order]
    _, weight_zero_point = packed.weight_scales()
    found = int_products(
        steps, zero_point, bits[1], codes, weight_zero_point, bits[0], scale_runs(packed)
    )
    if ordered or inputs != "per_channel_group":
        assert len(scale_runs(packed)) == 3
    v = codes.long() - weight_zero_point.long().repeat_interleave(32, 1)
    for run, product in zip(scale_runs(packed), found, strict=True):
        expected = steps[:, run.channels].long() @ v[:, run.channels].T
        assert torch.equal(product.long(), expected)
    assert sum(run.width for run in scale_runs(packed)) == 96

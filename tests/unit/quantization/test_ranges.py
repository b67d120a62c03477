"""Range rules against slow numpy references."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qvlm.errors import UserError
from qvlm.quantization import ranges
from qvlm.quantization.quantizer import TokenQuantizer, UniformQuantizer
from qvlm.quantization.ranges import (
    activation_quantizer,
    cluster_channels,
    lp_minimal,
    minmax,
    percentile,
    weight_quantizer,
)
from qvlm.quantization.spec import QuantSpec

pytestmark = pytest.mark.instruction_set

RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> Tensor:
    values = np.random.default_rng(seed).standard_t(2, (rows, columns))
    return torch.from_numpy(values * np.logspace(-1, 1, columns)).float()


def numpy_distances(values: np.ndarray, bits: int, p: float) -> list[float]:
    """Sum of |x - x_hat|^p for each ratio, the definition written out."""
    distances = []
    for ratio in RATIOS:
        lo, hi = ratio * min(values.min(), 0.0), ratio * max(values.max(), 0.0)
        scale = (hi - lo) / (2**bits - 1)
        zero_point = np.rint(-lo / scale)
        q = np.clip(np.rint(values / scale) + zero_point, 0, 2**bits - 1)
        distances.append(float((np.abs(values - (q - zero_point) * scale) ** p).sum()))
    return distances


def numpy_lp_range(values: Tensor, bits: int, p: float) -> tuple[float, float]:
    array = values.numpy().astype(np.float64)
    ratio = RATIOS[int(np.argmin(numpy_distances(array, bits, p)))]
    return ratio * min(array.min(), 0.0), ratio * max(array.max(), 0.0)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("p", [0.5, 2.0])
def test_lp_minimal_is_the_best_ratio_of_each_group(bits: int, p: float) -> None:
    groups = heavy_tailed(12, 300)
    lo, hi = lp_minimal(groups, QuantSpec(bits, "per_channel", p=p))
    expected = np.array([numpy_lp_range(row, bits, p) for row in groups])
    np.testing.assert_allclose(torch.stack([lo, hi], 1).numpy(), expected, rtol=1e-5)
    full_lo, _ = minmax(groups, QuantSpec(bits, "per_channel"))
    chosen = {round(ratio, 1) for ratio in (lo / full_lo).tolist()}
    assert len(chosen) > 1 or bits > 4  # the groups do differ


def test_the_search_in_pieces_is_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, spec = heavy_tailed(7, 50), QuantSpec(3, "per_channel")
    whole = ranges.lp_distances(groups, spec)
    for piece in (16, 130):
        monkeypatch.setattr(ranges, "_PIECE", piece)
        torch.testing.assert_close(ranges.lp_distances(groups, spec), whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fraction", [1.0, 0.995, 0.98, 0.75])
def test_percentile_is_numpys(fraction: float) -> None:
    groups = heavy_tailed(5, 401)
    lo, hi = percentile(fraction)(groups, QuantSpec(4, "per_channel"))
    np.testing.assert_allclose(hi.numpy(), np.quantile(groups.numpy(), fraction, 1), rtol=1e-5)
    np.testing.assert_allclose(lo.numpy(), np.quantile(groups.numpy(), 1 - fraction, 1), rtol=1e-4)


@pytest.mark.parametrize("fraction", [0.5, 1.01, -1.0])
def test_an_impossible_percentile_is_refused(fraction: float) -> None:
    with pytest.raises(UserError, match="percentile"):
        percentile(fraction)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-9, 0), st.floats(0, 9)), min_size=1), st.integers(1, 7))
def test_clusters_cut_the_sorted_channels(ends: list[tuple[float, float]], width: int) -> None:
    lo, hi = torch.tensor(ends, dtype=torch.float64).T
    clusters = cluster_channels(lo, hi, width).tolist()
    keys = [(high - low, low, i) for i, (low, high) in enumerate(ends)]
    ordered = [i for *_, i in sorted(keys)]
    assert [clusters[i] for i in ordered] == [rank // width for rank in range(len(ends))]


def test_a_cluster_shares_the_range_of_its_pooled_values() -> None:
    samples = heavy_tailed(200, 10)[:, torch.randperm(10, generator=torch.manual_seed(1))]
    quantizer = activation_quantizer(samples, QuantSpec(4, "per_channel_group", 4))
    assert isinstance(quantizer, UniformQuantizer)
    spans = np.maximum(samples.numpy().max(0), 0) - np.minimum(samples.numpy().min(0), 0)
    order = np.argsort(spans)
    for members in (order[:4], order[4:8], order[8:]):
        lo, hi = numpy_lp_range(samples[:, torch.from_numpy(members)], 4, 2)
        expected = (hi - lo) / 15
        assert quantizer.scale[members].tolist() == pytest.approx([expected] * len(members))
        assert len(set(quantizer.group_index(samples)[members].tolist())) == 1


def test_a_cluster_as_wide_as_the_layer_is_per_tensor() -> None:
    samples = heavy_tailed(100, 16)
    tensor = activation_quantizer(samples, QuantSpec(4, "per_tensor"))
    cluster = activation_quantizer(samples, QuantSpec(4, "per_channel_group", 128))
    assert torch.equal(tensor(samples), cluster(samples))


def test_static_activation_ranges() -> None:
    samples = heavy_tailed(200, 6)
    lo, hi = numpy_lp_range(samples, 5, 2)
    tensor = activation_quantizer(samples, QuantSpec(5, "per_tensor"))
    assert isinstance(tensor, UniformQuantizer) and not tensor.folds
    assert tensor.scale.item() == pytest.approx((hi - lo) / 31)
    channel = activation_quantizer(samples, QuantSpec(5, "per_channel"))
    assert isinstance(channel, UniformQuantizer) and channel.folds
    for index in range(6):
        lo, hi = numpy_lp_range(samples[:, index], 5, 2)
        assert channel.scale[index].item() == pytest.approx((hi - lo) / 31)


def test_the_per_token_ratio_is_the_best_over_all_tokens() -> None:
    samples = heavy_tailed(40, 64)
    totals = np.sum([numpy_distances(token, 3, 0.5) for token in samples.double().numpy()], axis=0)
    quantizer = activation_quantizer(samples, QuantSpec(3, "per_token", p=0.5))
    assert isinstance(quantizer, TokenQuantizer)
    assert quantizer.ratio == RATIOS[int(np.argmin(totals))] < 1
    unclipped = activation_quantizer(samples, QuantSpec(3, "per_token", ranges="minmax"))
    assert isinstance(unclipped, TokenQuantizer) and unclipped.ratio == 1
    clipped = activation_quantizer(samples, QuantSpec(3, "per_token"), percentile(0.9))
    assert isinstance(clipped, TokenQuantizer) and 0.4 <= clipped.ratio < 1


@pytest.mark.parametrize(
    "granularity", ["per_tensor", "per_token", "per_channel", "per_channel_group"]
)
def test_without_samples_the_quantizer_is_per_token(granularity: str) -> None:
    quantizer = activation_quantizer(torch.empty(0, 8), QuantSpec(3, granularity))
    assert isinstance(quantizer, TokenQuantizer) and quantizer.bits == 3 and quantizer.ratio == 1


def test_weight_ranges_per_row_and_per_group() -> None:
    weight = heavy_tailed(5, 24)
    rows = weight_quantizer(weight, QuantSpec(4, "per_channel"))
    groups = weight_quantizer(weight, QuantSpec(4, "per_group", 8))
    assert rows.scale.shape == (5, 1) and groups.scale.shape == (5, 3, 1)
    for row in range(5):
        lo, hi = numpy_lp_range(weight[row], 4, 2)
        assert rows.scale[row].item() == pytest.approx((hi - lo) / 15)
        for group in range(3):
            lo, hi = numpy_lp_range(weight[row, 8 * group : 8 * group + 8], 4, 2)
            assert groups.scale[row, group].item() == pytest.approx((hi - lo) / 15)
    assert torch.equal(groups(weight)[:, 8:16], _alone(weight[:, 8:16]))


def _alone(group: Tensor) -> Tensor:
    return weight_quantizer(group, QuantSpec(4, "per_channel"))(group)


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"group_size=7 does not divide the 24"):
        weight_quantizer(torch.ones(5, 24), QuantSpec(4, "per_group", 7))


def test_a_granularity_of_the_other_kind_is_refused() -> None:
    with pytest.raises(UserError, match="activation granularity='per_group'"):
        activation_quantizer(torch.ones(5, 24), QuantSpec(4, "per_group"))
    with pytest.raises(UserError, match="weight granularity='per_token'"):
        weight_quantizer(torch.ones(5, 24), QuantSpec(4, "per_token"))

"""Peers that are PyTorch modules compute what their weights stand for, in a layer and a model."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qvlm.packing import PackedLinear
from qvlm.tables.peers.bf16 import BF16
from qvlm.tables.peers.modules import ModulePeer
from qvlm.tables.peers.nf4 import NF4
from qvlm.tables.peers.packed import W4A4, W8A8
from qvlm.tables.peers.torch_int4 import GROUP_SIZE, TORCH_INT4
from tests.helpers import peers
from tests.helpers.nf4 import reference

pytestmark = pytest.mark.instruction_set

BFLOAT16 = 0.01  # relative difference of sums whose terms are rounded to bf16
LAYERS = 3


def unchanged(weight: Tensor) -> Tensor:
    return weight


def rounded_weight(weight: Tensor) -> Tensor:
    groups = weight.reshape(-1, GROUP_SIZE)
    scale = groups.abs().amax(1, keepdim=True) / 7
    return ((groups / scale).round() * scale).view_as(weight)


def normal_float(weight: Tensor) -> Tensor:
    return reference(weight)[1]


@pytest.mark.parametrize(
    ("peer", "change"), [(BF16, unchanged), (TORCH_INT4, rounded_weight), (NF4, normal_float)]
)
def test_a_peer_computes_with_its_weights(
    peer: ModulePeer, change: Callable[[Tensor], Tensor]
) -> None:
    model, x = peers.model(), peers.inputs(6)
    loaded = peer.load(model, LAYERS)
    given = {width: each.bfloat16() for width, each in x.items()}
    assert loaded.layer is not None and loaded.model is not None
    for y, expected in zip(loaded.layer()(given), peers.products(model, change, x), strict=True):
        assert peers.difference(y, expected) < BFLOAT16
    expected = peers.hidden_states(model, change, x[peers.HIDDEN], LAYERS)
    for _ in range(2):  # every start begins a sequence of its own
        step = loaded.model()
        y = torch.cat([step(part) for part in given[peers.HIDDEN].split([4, 1, 1])])
        assert peers.difference(y, expected) < 3 * BFLOAT16


def test_a_peer_is_not_in_training() -> None:
    """bitsandbytes multiplies several times slower there."""
    made: list[nn.Module] = []

    class Kept(ModulePeer):
        def linear(self, linear: nn.Linear) -> nn.Module:
            made.append(nn.Linear(linear.in_features, linear.out_features, bias=False))
            return made[-1]

    Kept().load(peers.model(), LAYERS)
    assert len(made) == 7 and not any(linear.training for linear in made)


@pytest.mark.parametrize(("peer", "bits", "allowed"), [(W4A4, 4, 0.3), (W8A8, 8, 0.2)])
def test_ours_is_packed_and_close_to_floating_point(
    peer: ModulePeer, bits: int, allowed: float
) -> None:
    layer = peer.linear(nn.Linear(peers.HIDDEN, 96, bias=False).requires_grad_(False))
    assert isinstance(layer, PackedLinear)
    assert (layer.form.weight_bits, layer.form.input_bits) == (bits, bits)
    model, x = peers.model(), peers.inputs(6)
    loaded = peer.load(model, LAYERS)
    assert loaded.layer is not None
    assert loaded.weight_bytes < (bits + 2) * BF16.load(model, 1).weight_bytes / 16
    found = loaded.layer()({width: each.bfloat16() for width, each in x.items()})
    for y, expected in zip(found, peers.products(model, unchanged, x), strict=True):
        assert peers.difference(y, expected) < allowed

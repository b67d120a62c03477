"""Peers: what is absent is said, and weights are rounded as NumPy rounds them."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from qvlm.tables.peers import PEERS
from qvlm.tables.peers.base import Loaded, Peer, rounded


class Absent(Peer):
    name = "nowhere"
    bits = 4
    packages: ClassVar = {"qvlm_nowhere": "qvlm-nowhere", "torch": "torch"}

    def load(self, model: LlamaForCausalLM, layers: int) -> Loaded:
        raise AssertionError("it has an obstacle")


class Elsewhere(Absent):
    packages: ClassVar = {"qvlm_nowhere": "qvlm-nowhere", "qvlm_lost": "qvlm-lost"}


def test_an_absent_package_is_said() -> None:
    one = "qvlm-nowhere is not installed. Give `pip install qvlm-nowhere`."
    both = (
        "qvlm-nowhere and qvlm-lost are not installed. Give `pip install qvlm-nowhere qvlm-lost`."
    )
    assert (Absent().obstacle(), Elsewhere().obstacle()) == (one, both)


def test_a_package_without_metadata_has_the_version_of_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "qvlm_copied.py").write_text("__version__ = '1.2.3'\n")
    (tmp_path / "qvlm_nameless.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)

    class Copied(Absent):
        packages: ClassVar = {"qvlm_copied": "copied", "qvlm_nameless": "nameless"}

    assert Copied().versions() == {"copied": "1.2.3", "nameless": "of an unknown version"}


def test_what_needs_no_package_has_no_obstacle() -> None:
    for peer in PEERS:
        assert peer.packages or peer.obstacle() is None, peer.name


def test_peers_have_names_of_their_own_and_the_references_come_first() -> None:
    assert len({peer.name for peer in PEERS}) == len(PEERS)
    assert [peer.name for peer in PEERS[:2]] == ["bf16", "ours, W4A4"]


@pytest.mark.parametrize("group_size", [32, 128])
def test_weights_are_rounded_around_zero(group_size: int) -> None:
    weight = torch.randn(6, 128)
    weight[0] = 0
    codes, scale = rounded(weight, group_size)
    groups = weight.numpy().reshape(6, -1, group_size)
    steps = np.maximum(abs(groups).max(2, keepdims=True), 1e-8) / np.float32(7)
    assert scale.numpy() == pytest.approx(steps[..., 0])
    values = (codes.numpy().reshape(groups.shape).astype(int) - 8) * steps
    assert abs(values - groups).max() <= steps.max() * 0.5001
    assert codes.min() >= 1 and codes.max() <= 15

"""`python -m qvlm.tables.peers` in toy size: ratios, ranking, absent peers, files."""

from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
from transformers import LlamaForCausalLM

from qvlm.models.llava import LlavaArchitecture
from qvlm.tables.peers import __main__ as command
from qvlm.tables.peers import measure as timing
from qvlm.tables.peers.base import Loaded, Peer
from qvlm.tables.peers.measure import LAYER, MODEL, PREFILL, Setting, measure
from qvlm.tables.peers.page import page, rows
from qvlm.tables.peers.ranking import verdict
from tests.helpers import peers

PHASES = ("prefill", "decoding")


class Clock:
    """Time that passes only where a stub says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Stub(Peer):
    """A peer of which a row takes some seconds: those of the layer, twice as many in a model."""

    def __init__(self, name: str, clock: Clock, row: float, bits: int = 4, **parts: bool) -> None:
        self.name, self.bits, self.clock, self.row = name, bits, clock, row
        self.is_ours = name.startswith("ours")
        self.parts = {LAYER: True, MODEL: True} | parts

    def load(self, model: LlamaForCausalLM, layers: int) -> Loaded:
        def step(factor: float, x: Any) -> None:
            assert (x if factor > 1 else x[peers.WIDE]).dtype == self.dtype
            self.clock.now += factor * self.row * len(x if factor > 1 else x[peers.WIDE])

        starts = {
            part: (lambda factor=factor: lambda x: step(factor, x))
            for part, factor in ((LAYER, 1.0), (MODEL, 2.0 * layers))
            if self.parts[part]
        }
        return Loaded(2**20 * self.bits, **starts)


class Absent(Stub):
    packages: ClassVar = {"qvlm_nowhere": "qvlm-nowhere"}


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> list[Peer]:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return [
        Stub("bf16", clock, 4.0, 16),
        Stub("ours, W4A4", clock, 1.0),
        Stub("ours, W8A8", clock, 2.0, 8),
        Stub("theirs", clock, 0.5, layer=False),
        Stub("products alone", clock, 8.0, model=False),
        Absent("nowhere", clock, 1.0),
    ]


def setting() -> Setting:
    return Setting(peers.CONFIG, layers=2, prompt=5, repeats=3)


def test_seconds_and_ratios(stubs: list[Peer]) -> None:
    measured = measure(stubs[:-1], setting())
    found = rows(measured, stubs).set_index(["part", "phase", "peer"])
    assert len(found) == 2 * 4 + 2 * 4
    for phase, count in zip(PHASES, (5, 1), strict=True):
        for part, factor in ((LAYER, 1), (MODEL, 2)):  # per layer, of two layers
            own = found.loc[(part, phase, "ours, W4A4")]
            assert own["seconds"] == pytest.approx(factor * count)
            assert own["times_bf16"] == pytest.approx(4)
            assert own["times_w4a4"] == pytest.approx(1)
            assert own["weight_mib"] == 4
        assert found.loc[(MODEL, phase, "theirs")]["times_w4a4"] == pytest.approx(2)
        assert found.loc[(LAYER, phase, "products alone")]["times_bf16"] == pytest.approx(0.5)
        assert (LAYER, phase, "theirs") not in found.index
        assert (MODEL, phase, "products alone") not in found.index


def test_who_is_first_follows_from_the_seconds() -> None:
    times = {"ours": [1.0, 1.2, 1.1], "a": [3.0, 2.4, 3.3], "b": [2.0, 2.4, 2.2]}
    assert verdict(times, "ours") == "**ours** is first, 2.00 (2.00 to 2.00) times as fast as b."
    times["a"] = [0.5, 0.3, 0.5]
    assert verdict(times, "ours") == "**a** is first, 2.20 (2.00 to 4.00) times as fast as ours."
    times["a"] = [0.5, 1.5, 0.5]
    assert verdict(times, "ours") == (
        "a and ours are not told apart: the former is 2.00 (0.80 to 2.20) times as fast as the "
        "latter."
    )
    assert verdict({"ours": [1.0]}, "ours") == "ours alone was measured."


def test_the_page(stubs: list[Peer]) -> None:
    text = page(measure(stubs[:-1], setting()), stubs, setting(), "make peers")
    assert "- qvlm-nowhere is not installed. Give `pip install qvlm-nowhere`.\n" in text
    assert "- Command: `make peers`\n" in text
    ranked = text[text.index("## Who is first") : text.index("## Prefill")]
    assert ranked.count("\n- ") == 4  # nobody is beside our W8A8
    assert (
        "- Prefill, products of a decoder layer, 4 bits: **ours, W4A4** is first, "
        "8.00 (8.00 to 8.00) times as fast as products alone.\n" in text
    )
    assert (
        "- Decoding, whole decoder layers, 4 bits: **theirs** is first, "
        "2.00 (2.00 to 2.00) times as fast as ours, W4A4.\n" in text
    )
    whole = text[text.index("## Prefill, whole") : text.index("## Decoding, whole")]
    (line,) = [line for line in whole.splitlines() if line.startswith("| ours, W8A8")]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1:] == [
        *("8.0", "20000.00", "2.00 (2.00 to 2.00)", "0.50 (0.50 to 0.50)", "800.00"),
    ]
    assert "nowhere |" not in text


def test_every_repeat_loads_anew_and_the_first_only_warms_up(
    stubs: list[Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, load = [], Stub.load
    monkeypatch.setattr(Stub, "load", lambda own, *words: loaded.append(own) or load(own, *words))
    measured = measure(stubs[:2], setting())
    assert loaded == stubs[:2] * 4
    assert {len(times) for times in measured.times[LAYER, PREFILL].values()} == {3}


def test_the_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stubs: list[Peer],
) -> None:
    tiny = LlavaArchitecture(text_config=peers.CONFIG)
    monkeypatch.setattr(command, "architecture", lambda name: tiny)
    monkeypatch.setattr(command, "PEERS", stubs)
    assert command.main(["--repeats", "2", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.md")  # a machine of another kind writes another one
    text = file.read_text(encoding="utf-8")
    assert f"our C products {file.stem.removeprefix('peers_')}." in text
    assert capsys.readouterr().out == text
    assert f"python -m qvlm.tables.peers --repeats 2 --out {tmp_path}" in text
    assert list(pd.read_csv(file.with_suffix(".csv"))["peer"].unique()) == [
        *("bf16", "ours, W4A4", "ours, W8A8", "products alone", "theirs"),
    ]


def test_bad_options_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--repeats", "0"]) == 2
    assert command.main(["--threads", "0"]) == 2
    assert "--threads=0 is not a whole number of at least 1." in capsys.readouterr().err

"""The figure of DED against dependency: its rows mean what they say."""

import importlib.util
from pathlib import Path

import pandas as pd
import pytest

from qvlm.methods.qvlm.search_options import SearchOptions
from qvlm.quantization import QuantizationConfig, QuantSpec, Walk
from tests.helpers.toy import toy_batches, toy_llava

SOURCE = Path(__file__).resolve().parents[2] / "experiments" / "dependency_figure.py"
SPEC = importlib.util.spec_from_file_location("dependency_figure", SOURCE)
assert SPEC is not None
assert SPEC.loader is not None
figure = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(figure)


def quantization() -> QuantizationConfig:
    activation = QuantSpec(3, "per_channel_group", 16)
    return QuantizationConfig(QuantSpec(3, "per_group", 16), activation, QuantSpec(3, "per_token"))


def test_three_layers_are_spread_over_the_decoder() -> None:
    assert figure.three_layers(4) == [1, 2, 3]
    assert figure.three_layers(40) == [10, 20, 30]
    assert figure.three_layers(1) == [0]


def test_runs_are_consecutive_shallow_and_within_an_expert() -> None:
    for text in ("llama", "routed"):
        walk = Walk(toy_llava(text), toy_batches(2), quantization())
        for block in walk.blocks():
            names = list(block.linears)
            runs = figure.runs_of(block, names)
            assert [name for run in runs for name in run] == names
            assert max(map(len, runs)) <= figure.DEPTH
            for run in runs:
                assert len({name.partition("experts.")[2][:1] for name in run}) == 1


def test_rows_and_panels(tmp_path: Path) -> None:
    model = toy_llava("llama", decoder_layers=4)
    search = SearchOptions(percentiles=(1.0, 0.97))
    batches = toy_batches(3)
    rows = [row for b in batches for row in figure.measure(model, b, quantization(), search)]
    frame = pd.DataFrame(rows)
    assert frame["layer"].tolist() == [1, 2, 3] * len(batches)
    assert (frame["ded"] >= 0).all()  # a joint search is never worse
    assert (frame["entropy"] > 0).all()
    assert (frame["quantization_error"] > 0).all()
    # The model is in floating point again: measured twice, the same.
    again = figure.measure(model, batches[0], quantization(), search)
    assert again == rows[:3]
    figure.draw(frame, "toy", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_no_labels_of_the_figure_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pd.read_csv(SOURCE.parents[1] / "results" / "figure2.csv")
    monkeypatch.setattr(figure.pyplot, "close", lambda _: None)
    figure.draw(frame, "title", tmp_path / "figure.png")
    drawn = figure.pyplot.gcf()
    monkeypatch.undo()
    for panel in drawn.axes:
        for place, axis in enumerate((panel.xaxis, panel.yaxis)):
            low, high = axis.get_view_interval()  # labels beyond it are not drawn
            labels = [label for label in axis.get_ticklabels() if label.get_text()]
            shown = [label for label in labels if low <= label.get_position()[place] <= high]
            boxes = [label.get_window_extent() for label in shown]
            boxes += [axis.label.get_window_extent(), axis.offsetText.get_window_extent()]
            boxes = [box for box in boxes if box.width]
            assert len(boxes) >= 3
            assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    figure.pyplot.close(drawn)

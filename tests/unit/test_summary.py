"""What a command prints at its end: functions of records, which say what was run."""

import io
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console, RenderableType

from qvlm import summary
from qvlm.evaluation.metrics import CLASSES
from qvlm.records.record import Record
from tests.helpers.records import make_layers, make_record


def plain(rendered: RenderableType, width: int = 120) -> str:
    """What a reader sees where there is no terminal."""
    file = io.StringIO()
    Console(file=file, width=width).print(rendered)
    return file.getvalue()


def row(text: str, *starts: str) -> list[str]:
    """The cells of the line that begins with these words."""
    (line,) = [line for line in text.splitlines() if line.split()[: len(starts)] == [*starts]]
    return re.split(r"\s{2,}", line.strip())


def unproven(bits: str) -> list[dict[str, Any]]:
    """A proof with a layer that takes too many values."""
    layers = make_layers(bits)
    layers[2]["input_levels"] = 17
    return layers


def test_a_cell_shows_every_class_beside_full_precision(tmp_path: Path) -> None:
    full = make_record(tmp_path, bits="FP", accuracy=80.0)
    record = make_record(tmp_path, accuracy=60.0)
    text = plain(summary.cell_summary(record))
    for name in CLASSES:
        own, other = (r.metrics["classes"][name] for r in (record, full))
        _, questions, accuracy, reference, difference = row(text, name)[-5:]
        assert int(questions) == own["n"]
        assert accuracy == f"{own['accuracy']:.2f} ({own['ci_low']:.1f}-{own['ci_high']:.1f})"
        assert float(reference) == round(other["accuracy"], 2)
        change = own["accuracy"] - other["accuracy"]
        assert float(difference.split()[0]) == pytest.approx(change, abs=0.006)
    assert "proven in 5 layers: at most 16 weight and 15 input values per scale" in text
    assert str(record.path) in text.replace("\n", "")
    assert "load 1.5, quantize 1.5, evaluate 1.5" in text


def test_it_says_where_the_report_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/qvlm"])
    record = make_record(tmp_path / "runs")
    for rendered in (summary.cell_summary, lambda one: summary.sweep_summary([one, one])):
        assert f"qvlm report --results={tmp_path}" in plain(rendered(record), 300)
    odd = make_record(tmp_path / 'of "June, 2"' / "runs")
    words = plain(summary.cell_summary(odd), 300).partition("qvlm report ")[2].splitlines()[0]
    assert shlex.split(words) == [f"--results={odd.path.parents[1]}"]
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html").touch()
    for rendered in (summary.cell_summary, lambda one: summary.sweep_summary([one, one])):
        assert str(tmp_path / "report" / "index.html") in plain(rendered(record), 300)


def test_without_full_precision_it_says_how_to_get_it(tmp_path: Path) -> None:
    text = plain(summary.cell_summary(make_record(tmp_path)))
    assert "method=fp" in text
    assert "FP, %" not in text


@pytest.mark.parametrize(
    "other", [{"weights": "others"}, {"evaluation": {"limit": 8}}, {"data": {"name": "mine"}}]
)
def test_full_precision_of_something_else_is_no_reference(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    record = make_record(tmp_path)
    setting = {"data": {"name": "miniature", "split": "test", "seed": 0}, **other}
    make_record(tmp_path, bits="FP", name="mini_llava-fp-fp-other", **setting)
    assert summary.find_reference(record) is None
    make_record(tmp_path, bits="FP", name="mini_llava-fp-fp-same")
    found = summary.find_reference(record)
    assert found is not None
    assert found.name == "mini_llava-fp-fp-same"


def test_the_newest_full_precision_counts_and_a_damaged_one_does_not(tmp_path: Path) -> None:
    record = make_record(tmp_path)
    for name, day in (("old", 1), ("new", 3), ("damaged", 5)):
        finished = f"2026-01-0{day}T00:00:00+00:00"
        make_record(tmp_path, bits="FP", name=f"mini_llava-fp-fp-{name}", finished=finished)
    (tmp_path / "mini_llava-fp-fp-damaged" / "metrics.json").write_text("{}")
    found = summary.find_reference(record)
    assert found is not None
    assert found.name == "mini_llava-fp-fp-new"


def test_a_cell_whose_bits_are_false_is_refused(tmp_path: Path) -> None:
    text = plain(summary.cell_summary(make_record(tmp_path, layers=unproven("W4A4"))))
    assert "not proven: tables refuse this record. language.layers.0.up: 17 input values" in text


def sweep(tmp_path: Path) -> list[Record]:
    return [
        make_record(tmp_path, "Q-VLM", accuracy=70.0),
        make_record(tmp_path, "RTN", accuracy=60.0),
        make_record(tmp_path, bits="FP", accuracy=80.0),
        make_record(tmp_path, "RTN", bits="W6A6", accuracy=78.0),
        make_record(tmp_path, "RTN", model="mini_moe_llava", accuracy=50.0),
    ]


def test_a_sweep_is_compared_model_by_model_in_the_order_of_tables(tmp_path: Path) -> None:
    records = sweep(tmp_path)
    text = plain(summary.sweep_summary(records))
    first, second = text.split("mini_moe_llava on")
    assert "mini_llava on 300 questions of miniature, split test" in first
    shown = [
        line.split()[:2] for line in first.splitlines() if "(" in line and "method" not in line
    ]
    assert [words[0] for words in shown] == ["FP", "RTN", "RTN", "Q-VLM"]
    assert [words[1] for words in shown[1:]] == ["W6A6", "W4A4", "W4A4"]
    change = records[0].metrics["classes"]["Avg"]["accuracy"]
    change -= records[2].metrics["classes"]["Avg"]["accuracy"]
    *_, difference, seconds, proven = row(first, "Q-VLM")
    assert float(difference.split()[0]) == pytest.approx(change, abs=0.006)
    assert (seconds, proven) == ("4.5", "yes")
    assert "not recorded" in row(second, "RTN")
    assert str(tmp_path) in text


def test_a_sweep_names_the_row_that_tables_refuse(tmp_path: Path) -> None:
    records = [*sweep(tmp_path), make_record(tmp_path, "AWQ", layers=unproven("W4A4"))]
    text = plain(summary.sweep_summary(records))
    assert [cells[-1] for cells in (row(text, "AWQ", "W4A4"), row(text, "Q-VLM"))] == ["NO", "yes"]
    assert "AWQ W4A4: tables refuse this record. language.layers.0.up: 17 input values" in text


def test_options_that_differ_have_columns(tmp_path: Path) -> None:
    def cell(name: str, samples: int, depth: int) -> Record:
        return make_record(
            tmp_path,
            "Q-VLM",
            name=name,
            parameters={"max_depth": depth},
            calibration={"split": "train", "samples": samples},
        )

    records = [cell("a", 3, 1), cell("b", 8, 2), make_record(tmp_path, "RTN")]
    text = plain(summary.sweep_summary(records), 110)
    names = ["method.", "bits", "calibration.", "max_depth", "samples", "quantizer.", "_target_"]
    assert [name in text for name in names] == [True] * 5 + [False] * 2
    assert [row(text, "Q-VLM", "W4A4", samples)[3] for samples in "38"] == ["1", "2"]
    assert row(text, "RTN", "W4A4")[2] == "3"  # RTN has no max_depth


@pytest.mark.parametrize("count", [1, 2])
def test_it_fits_a_terminal_of_eighty_columns(tmp_path: Path, count: int) -> None:
    records = sweep(tmp_path)
    rendered = (
        summary.cell_summary(records[0], described=False)
        if count == 1
        else summary.sweep_summary(records)
    )
    text = plain(rendered, 80)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text


def printed(paths: Sequence[Path], capfd: pytest.CaptureFixture[str]) -> tuple[str, str]:
    summary.print_summary(paths)
    out, err = capfd.readouterr()
    return out, err


def test_what_is_not_a_record_is_left_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "packed").mkdir()
    assert printed([tmp_path / "packed"], capfd) == ("", "")
    record = make_record(tmp_path)
    out, _ = printed([tmp_path / "packed", record.path, record.path], capfd)
    assert "mini_llava, RTN W4A4 on" in out  # one cell, not a comparison with itself


def test_a_damaged_record_costs_the_summary_only(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = make_record(tmp_path)
    (record.path / "bits.json").write_text("[]")
    out, err = printed([record.path], capfd)
    assert out == ""
    assert err.startswith("warning: there is no summary, because ")
    assert err.count("\n") == 1


def test_a_cell_on_text_shows_its_measures(tmp_path: Path) -> None:
    documents = pd.DataFrame(
        {
            "document": ["a", "b"],
            "tokens": [100, 300],
            "nll": [100.0, 300.0],
            "kl": [10.0, 50.0],
            "agreement": [90, 270],
        }
    )
    record = make_record(tmp_path, documents=documents)
    shown = plain(summary.cell_summary(record))
    assert "2.718" in shown  # exp(1)
    assert "0.150" in shown
    assert "90.000" in shown
    assert "2 documents of miniature" in shown
    other = make_record(tmp_path, method="AWQ", documents=documents)
    assert "KL, nats" in plain(summary.sweep_summary([record, other]))


def test_a_cell_on_tasks_shows_its_metrics(tmp_path: Path) -> None:
    record = make_record(tmp_path, tasks={"arc_easy": 0.62518, "piqa": 0.5})
    shown = plain(summary.cell_summary(record))
    assert "mini_llava, RTN W4A4 on tasks arc_easy, piqa" in shown
    assert row(shown, "arc_easy")[1:] == ["accuracy", "2", "0.6252", "0.12"]
    assert "proven in 5 layers" in shown
    other = make_record(tmp_path, method="AWQ", tasks={"arc_easy": 0.25, "piqa": 0.75})
    compared = plain(summary.sweep_summary([record, other]))
    assert row(compared, "AWQ", "W4A4")[2:4] == ["0.25", "0.75"]
    fewer = replace(record, predictions=record.predictions[:3])
    assert "its results of piqa do not follow" in plain(summary.cell_summary(fewer))


def test_a_score_that_is_not_finite_keeps_its_column(tmp_path: Path) -> None:
    make_record(tmp_path, tasks={"one": 0.5, "two": 0.25}, name="a")
    make_record(tmp_path, bits="W6A6", tasks={"one": float("nan"), "two": 0.75}, name="b")
    records = [Record.load(tmp_path / name) for name in "ab"]
    text = plain(summary.sweep_summary(records))
    assert row(text, "RTN", "W6A6")[2:4] == ["nan", "0.75"]
    assert row(text, "RTN", "W4A4")[2:4] == ["0.5", "0.25"]
    assert row(plain(summary.cell_summary(records[1])), "one")[3] == "nan"


def test_a_sweep_over_what_is_quantized_compares_proofs_of_the_same_quantizer(
    tmp_path: Path,
) -> None:
    layers = [layer for layer in make_layers("W4A4") if "vision" not in layer["layer"]]
    records = [
        make_record(tmp_path, name="both", quantizer={"vision_tower": True}),
        make_record(tmp_path, name="language", quantizer={"vision_tower": False}, layers=layers),
    ]
    text = plain(summary.sweep_summary(records))
    assert "refuse" not in text
    assert "NO" not in text
    lacking = make_record(tmp_path, "AWQ", quantizer={"vision_tower": True}, layers=layers)
    assert "missing from the proof, which both has" in plain(
        summary.sweep_summary([*records, lacking]), 300
    )

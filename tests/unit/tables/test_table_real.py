"""The table of a real language model: planted records, and records that must not be shown."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from qvlm.evaluation.text_metrics import summarize
from qvlm.records.record import Record
from qvlm.tables.answers import folder_of, obstacle, read_answers, write_answers
from qvlm.tables.selection import select
from qvlm.tables.table_real import NAME, NOT_MEASURED, long, main, page, texts_of
from tests.helpers.records import make_layers, make_record

TOKENS = np.array([900, 1000, 1100])


def planted(
    runs: Path,
    granularity: str = "per_channel",
    draw: int = 0,
    kl: float | None = 0.5,
    method: str = "RTN",
    bits: str = "W4A4",
    **more: Any,
) -> Record:
    """A record on text with this KL per token, of three documents that differ a little."""
    sums = {"document": list("abc"), "tokens": TOKENS, "nll": TOKENS * np.array([2.9, 3.0, 3.1])}
    if kl is not None:
        sums |= {"kl": TOKENS * kl * np.array([0.9, 1.0, 1.1]), "agreement": TOKENS * 0.75}
    quantizer = {"language": {"granularity": granularity}, "first_token": "quantized"}
    quantizer |= more.pop("quantizer", {})
    setting = {
        "quantizer": quantizer,
        "calibration": {"split": "train", "samples": 16, "tokens": 256, "seed": draw},
    }
    name = f"tiny-{method}-{bits}-{granularity}-{draw}-{quantizer['first_token']}"
    setting = {} if bits == "FP" else setting
    return make_record(
        *(runs, method, bits, "tiny"), documents=pd.DataFrame(sums), name=name, **setting, **more
    )


def cells_of(text: str, method: str, activations: str) -> list[str]:
    """The cells of one row of the first table."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return next(row[2:] for row in rows if row[:2] == [method, activations])


def test_a_cell_is_the_mean_over_draws(tmp_path: Path) -> None:
    records = [planted(tmp_path, bits="FP", kl=None)]
    records += [planted(tmp_path, draw=draw, kl=kl) for draw, kl in enumerate((0.3, 0.6, 0.9))]
    text = page(records, "make table-real")
    mean = np.average([0.9, 1.0, 1.1], weights=TOKENS)  # longer documents count more
    assert cells_of(text, "RTN", "static, per channel")[-1].startswith(f"**{0.6 * mean:.3f}**")
    detail = text.partition("in detail")[2]
    assert f"{0.3 * mean:.3f} to {0.9 * mean:.3f}" in detail


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    text = page([planted(tmp_path)], "make table-real")
    assert cells_of(text, "AWQ", "static, per channel") == [NOT_MEASURED] * 5
    assert cells_of(text, "RTN", "per channel of the prompt") == [NOT_MEASURED] * 5
    assert f"perplexity is {NOT_MEASURED}" in text
    bare = planted(tmp_path, draw=5, kl=None)
    assert cells_of(page([bare], "c"), "RTN", "static, per channel")[-1].startswith(
        f"**{NOT_MEASURED}**"
    )


def test_scales_of_tokens_by_the_option_and_by_a_method_are_both_shown(tmp_path: Path) -> None:
    """The option says "per channel" of a method that has scales of tokens whatever it says."""
    records = [planted(tmp_path, "per_token", kl=3.0)]
    records += [planted(tmp_path, method=f"{name}, per token") for name in ("GPTQ", "RoCo")]
    text = page(records, "make table-real")
    assert text.partition("## Refused rows")[2].lstrip().startswith("None.")
    for record in records:
        assert NOT_MEASURED not in cells_of(text, record.method, "per token")[-1]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"evaluation": {"limit": 1}}, "another setting: evaluation.limit is 1, not null"),
        ({"quantizer": {"ranges": "minmax"}}, "another setting: quantizer.ranges is minmax, not"),
        ({"weights": "new"}, "has newer weights or data"),
    ],
)
def test_draws_of_another_setting_are_not_averaged_in(
    tmp_path: Path, other: dict[str, Any], words: str
) -> None:
    usual: dict[str, Any] = {}
    if "weights" in other:  # of which the newest counts
        other, usual = {}, {**other, "finished": "2026-02-01"}
    records = [planted(tmp_path, draw=draw, kl=0.3, **usual) for draw in (0, 2)]
    records.insert(0, planted(tmp_path, draw=1, kl=9.0, finished="2026-01-02", **other))
    records.append(planted(tmp_path, "per_token", **usual))
    text = page(records, "make table-real")
    mean = np.average([0.9, 1.0, 1.1], weights=TOKENS)
    assert cells_of(text, "RTN", "static, per channel")[-1].startswith(f"**{0.3 * mean:.3f}**")
    assert words in text.partition("## Refused rows")[2]
    assert "Records: 3." in text
    assert set(long(records)["run"]) == {record.name for record in records[1:]}


def test_a_single_document_has_no_interval(tmp_path: Path) -> None:
    sums = {"document": ["a"], "tokens": [900], "nll": [2700.0], "kl": [90.0], "agreement": [700.0]}
    full = planted(tmp_path, bits="FP", kl=None)
    records = [planted(tmp_path, draw=draw) for draw in range(2)]
    alone = [
        replace(record, predictions=frame, metrics={"text": summarize(frame)})
        for record in (full, *records)
        for frame in [pd.DataFrame(sums)]
    ]
    text = page(alone, "make table-real")
    assert f"95 % interval {NOT_MEASURED}" in text
    row = cells_of(text.partition("in detail")[2], "RTN", "static, per channel")
    assert row[:3] == ["2", "0.100", NOT_MEASURED]


def test_the_first_token_in_float_is_a_row_of_its_own(tmp_path: Path) -> None:
    records = [planted(tmp_path), planted(tmp_path, kl=0.1, quantizer={"first_token": "float"})]
    text = page(records, "make table-real")
    assert "0.5" in cells_of(text, "RTN", "static, per channel")[-1]
    assert "0.1" in cells_of(text, "RTN", "static, per channel, first token in float")[-1]


def test_a_record_whose_bits_are_false_is_refused(tmp_path: Path) -> None:
    layers = make_layers("W4A4")
    layers[1]["input_levels"] = 17
    record = planted(tmp_path, layers=layers)
    text = page([record], "make table-real")
    assert cells_of(text, "RTN", "static, per channel")[-1] == NOT_MEASURED
    assert f"`{record.name}`: {layers[1]['layer']}: 17 input values per scale" in text
    assert long([record]).empty


def test_measures_that_do_not_follow_from_the_documents_are_refused(tmp_path: Path) -> None:
    record = planted(tmp_path)
    record.metrics["text"]["kl"]["value"] *= 0.9
    assert "its kl does not follow from its documents" in page([record], "c")


def test_question_tables_do_not_show_text(tmp_path: Path) -> None:
    records = [planted(tmp_path), make_record(tmp_path)]
    selection = select(records)
    assert [record.kind for record in selection.shown] == ["problems"]
    assert not selection.refused


def test_the_command_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted(tmp_path / "runs")
    make_record(tmp_path / "runs")  # of another table
    out = tmp_path / "out"
    assert main([f"--runs={tmp_path}/runs", f"--out={out}", "--command=make table-real"]) == 0
    text = (out / "table_real.md").read_text()
    assert capsys.readouterr().out == text
    rows = pd.read_csv(out / "table_real.csv")
    assert list(rows["measure"]) == ["perplexity", "kl", "agreement"]
    assert rows["tokens"].unique().tolist() == [int(TOKENS.sum())]
    written = json.loads((tmp_path / "runs" / rows["run"][0] / "metrics.json").read_text())
    assert rows["value"][1] == pytest.approx(written["text"]["kl"]["value"], rel=1e-5)


def test_the_page_follows_from_what_is_committed(tmp_path: Path) -> None:
    runs, out = tmp_path / "runs", tmp_path / "results"
    planted(runs, bits="FP", kl=None)
    planted(runs, draw=0, kl=0.3)
    assert main([f"--runs={runs}", f"--out={out}", "--command=make table-real"]) == 0
    printed = {name: (out / name).read_text() for name in ("table_real.md", "table_real.csv")}
    assert texts_of(read_answers(folder_of(out, NAME)), "make table-real") == printed


def test_committed_cells_stay_where_records_are_added(tmp_path: Path) -> None:
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "results"
    planted(first, bits="FP", kl=None)
    planted(first, draw=0, kl=0.3)
    planted(first, draw=1, kl=0.4)
    assert main([f"--runs={first}", f"--out={out}"]) == 0
    planted(second, draw=1, kl=0.5, finished="2027")  # the same cell anew
    planted(second, draw=2, kl=0.6)
    assert main([f"--runs={second}", f"--out={out}", "--add"]) == 0
    rows = pd.read_csv(out / "table_real.csv").query("measure == 'kl'").dropna(subset="value")
    assert rows["draw"].tolist() == [0, 1, 2]
    assert rows["value"].round(1).tolist() == [0.3, 0.5, 0.6]
    assert len(read_answers(folder_of(out, NAME))) == 4
    assert main([f"--runs={second}", f"--out={out}"]) == 0  # without --add they are replaced
    assert len(read_answers(folder_of(out, NAME))) == 2


def test_measures_that_do_not_follow_are_kept_with_the_answers(tmp_path: Path) -> None:
    record = planted(tmp_path / "runs")
    record.metrics["text"]["kl"]["value"] += 0.1
    write_answers(tmp_path / "answers", [record])
    (committed,) = read_answers(tmp_path / "answers")
    assert committed.metrics["text"] == record.metrics["text"]
    assert page([committed], "c") == page([record], "c")
    assert "does not follow from its documents" in page([committed], "c")


def test_other_texts_are_not_committed(tmp_path: Path) -> None:
    record = planted(tmp_path)
    assert obstacle(record) is None
    record.config["data"]["source"] = "/home/somebody/texts"
    assert obstacle(record) == "its texts are not those of the package"


def test_a_cell_with_other_parameters_takes_no_place_of_its_method(tmp_path: Path) -> None:
    plain = [planted(tmp_path, draw=draw, parameters={"online": ["down_proj"]}) for draw in (0, 1)]
    other = planted(
        tmp_path / "later", kl=0.1, parameters={"online": ["o_proj"]}, finished="2099-01-01"
    )
    text = page([*plain, other], "make table-real")
    assert "**0.5" in cells_of(text, "RTN", "static, per channel")[-1]
    assert "other parameters than most of its method: online is" in text

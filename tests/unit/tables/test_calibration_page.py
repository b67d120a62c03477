"""What calibration problems do: a method under both kinds, tested on the same questions."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from qvlm.records.record import find_records
from qvlm.tables import calibration, verify
from qvlm.tables.calibration import COLUMNS, NAME, texts_of
from tests.helpers.pages import cells
from tests.helpers.records import make_record

PAIRS, EVERY = "image-text pairs", "all problems"


def planted(runs: Path, method: str, images: str, accuracy: float, **more: Any) -> None:
    granularity, draw = more.pop("granularity", "per_channel"), more.pop("draw", 0)
    short = method.lower().replace(", ", "-").replace(" ", "")
    make_record(
        *(runs, method, more.pop("bits", "W4A4")),
        accuracy=accuracy,
        name=f"mini_llava-{short}-{images}{draw or ''}",
        quantizer={"language": {"granularity": granularity}, "first_token": "quantized"},
        calibration={"images": images, "samples": 64, "seed": draw},
        generated=True,
        **more,
    )


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two methods under both kinds of problems, and one under one kind."""
    folder = tmp_path / "runs"
    make_record(folder, bits="FP", accuracy=90, name="mini_llava-fp", generated=True)
    for method, pairs, every in (("RTN", 60, 85), ("AWQ", 80, 80)):
        planted(folder, method, "only", pairs)
        planted(folder, method, "any", every)
    planted(folder, "QLoRA", "only", 70)
    return folder


def rows_of(text: str) -> dict[str, list[str]]:
    """The rows of the first table, by method."""
    table = text.partition("\n| method ")[2].partition("\n\n")[0]
    lines = [cells(line) for line in table.splitlines()[2:]]
    return {line[0].strip("*"): line[1:] for line in lines}


def test_a_row_has_both_kinds_and_what_the_second_brings(runs: Path) -> None:
    text = texts_of(find_records(runs), "make calibration")[f"{NAME}.md"]
    rows = rows_of(text)
    assert [*rows] == ["FP", "RTN", "AWQ"]  # one kind alone is no comparison
    by_name = {r.name: r.metrics["classes"]["Avg"]["accuracy"] for r in find_records(runs)}
    pairs, every = by_name["mini_llava-rtn-only"], by_name["mini_llava-rtn-any"]
    assert (float(rows["RTN"][0]), float(rows["RTN"][2])) == pytest.approx((pairs, every), abs=0.01)
    assert float(rows["RTN"][4]) == pytest.approx(every - pairs, abs=0.01)
    assert rows["RTN"][-1] == f"{EVERY} ahead"
    assert rows["AWQ"][-1] == "not told apart" and rows["AWQ"][4] == "0.00"


def test_differences_by_class_stand_below(runs: Path) -> None:
    text = texts_of(find_records(runs), "make calibration")[f"{NAME}.md"]
    below = text.partition("by class of question")[2]
    line = next(cells(row) for row in below.splitlines() if row.startswith("| RTN"))
    header = next(cells(row) for row in below.splitlines() if row.startswith("| method"))
    records = {record.name: record for record in find_records(runs)}
    for name, shown in zip(header[1:], line[1:], strict=True):
        one, other = (
            records[f"mini_llava-rtn-{kind}"].metrics["classes"][name]["accuracy"]
            for kind in ("any", "only")
        )
        assert float(shown) == pytest.approx(one - other, abs=0.01)


def test_other_draws_stand_at_the_end(runs: Path) -> None:
    main = texts_of(find_records(runs), "x")[f"{NAME}.md"].partition("## Refused")[0]
    planted(runs, "RTN", "only", 80, draw=1)
    planted(runs, "RTN", "any", 70, draw=1)
    planted(runs, "AWQ", "any", 70, draw=1)
    text = texts_of(find_records(runs), "x")[f"{NAME}.md"]
    assert text.startswith(main)
    below = text.partition("## Other draws")[2].partition("## Refused")[0]
    (row,) = (cells(line) for line in below.splitlines() if line.startswith("| mini_llava"))
    assert row[:4] == ["mini_llava", "W4A4", "RTN", "1"]
    assert float(row[6]) == pytest.approx(float(row[5]) - float(row[4]), abs=0.01)
    assert "## Records not shown" not in text


def test_other_granularities_are_not_the_subject(runs: Path) -> None:
    before = texts_of(find_records(runs), "x")
    planted(runs, "RoCo", "any", 80, granularity="per_tensor")
    planted(runs, "ZeroQuant-V2, per token", "any", 80)
    assert texts_of(find_records(runs), "x") == before


def test_the_page_follows_from_its_answers(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    assert calibration.main(["--runs", str(runs), "--out", str(out)]) == 0
    frame = pd.read_csv(out / "calibration.csv")
    assert [*frame.columns] == [*COLUMNS]
    assert {*frame["calibration"].dropna()} == {PAIRS, EVERY}
    (checked,) = (entry for entry in verify.PAGES if entry.name == NAME)
    assert not verify.check(checked, out)
    path = out / "calibration.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(rows_of(text)["RTN"][0], "12.34", 1), encoding="utf-8")
    assert verify.check(checked, out)


def test_it_is_a_pure_function_of_the_records(runs: Path) -> None:
    records = find_records(runs)
    assert texts_of(records, "x") == texts_of(records[::-1], "x")

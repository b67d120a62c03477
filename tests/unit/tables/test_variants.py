"""Tables 1 and 5: the rows of their records, the paper's beside them, and nothing of Table 2's."""

from pathlib import Path

import pandas as pd
import pytest

from qvlm.records.record import Record
from qvlm.tables import table1, table2, table5
from qvlm.tables.command import Table
from qvlm.tables.labels import CDM, ERROR_PROXY, VEO
from qvlm.tables.published import published
from qvlm.tables.selection import select
from qvlm.tables.variants import COLUMNS
from tests.helpers.pages import cells
from tests.helpers.records import make_record

ACCURACY = {
    "FP": 90.0,
    "RTN": 50.0,
    "QLoRA": 55.0,
    "Layer-wise": 60.0,
    CDM: 64.0,
    VEO: 61.0,
    ERROR_PROXY: 62.0,
    "Q-VLM": 70.0,
}


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    return [
        make_record(
            tmp_path / "runs",
            method,
            "FP" if method == "FP" else "W4A4",
            accuracy=accuracy,
            name=f"mini_llava-{index}",
            parameters={"part": method} if "Q-VLM" in method else None,
        )
        for index, (method, accuracy) in enumerate(ACCURACY.items())
    ]


def page(table: Table, records: list[Record]) -> str:
    return table.render(select(records, table.wanted), "make it")


def rows_of(text: str, start: str) -> list[list[str]]:
    return [cells(line) for line in text.splitlines() if cells(line)[0] == start]


def test_each_table_shows_its_own_methods_only(records: list[Record]) -> None:
    shown = {
        name: [record.method for record in select(records, table.wanted).shown]
        for name, table in (("1", table1.TABLE), ("2", table2.TABLE), ("5", table5.TABLE))
    }
    assert set(shown["1"]) == {"FP", "QLoRA", "Layer-wise", CDM, VEO, "Q-VLM"}
    assert set(shown["2"]) == {"FP", "RTN", "QLoRA", "Layer-wise", "Q-VLM"}
    assert set(shown["5"]) == {"FP", CDM, ERROR_PROXY}
    assert CDM not in page(table2.TABLE, records)


def test_a_measured_row_and_the_papers_row_below_it(records: list[Record]) -> None:
    text = page(table1.TABLE, records)
    lines = text.splitlines()
    measured = next(i for i, line in enumerate(lines) if line.startswith(f"| **{CDM}**"))
    ours, paper = cells(lines[measured]), cells(lines[measured + 1])
    record = next(record for record in records if record.method == CDM)
    assert ours[1] == "measured"
    assert float(ours[2]) == pytest.approx(record.metrics["classes"]["Avg"]["accuracy"], abs=0.005)
    assert ours[6:] == ["2.0 s", "7", "700 MiB"]
    printed = published("table1").query("bits == 'W4A4' and method == 'QLoRA+CDM'").iloc[0]
    assert paper[:3] == ["", "*paper, LLaVA-7B, QLoRA+CDM*", f"*{printed['accuracy']:.2f}*"]
    assert paper[6] == f"*{printed['search_cost_hours']:g} h*"
    assert paper[8] == f"*{printed['memory_gib']:g} GiB*"
    # The control has no row in the paper.
    control = next(i for i, line in enumerate(lines) if line.startswith("| **Layer-wise**"))
    assert lines[control + 1].startswith("| **")


def test_table1_tests_the_parts_against_the_control(records: list[Record]) -> None:
    text = page(table1.TABLE, records)
    for pair in (
        f"{CDM} - Layer-wise",
        f"{VEO} - Layer-wise",
        "Q-VLM - Layer-wise",
        "Q-VLM - QLoRA",
        f"Q-VLM - {CDM}",
        f"Q-VLM - {VEO}",
    ):
        assert len(rows_of(text, pair)) == 1


def test_table5_has_both_proxies_of_both_models_of_the_paper(records: list[Record]) -> None:
    text = page(table5.TABLE, records)
    assert len(rows_of(text, f"{CDM} - {ERROR_PROXY}")) == 1
    printed = published("table5").set_index(["model", "proxy"])["W4A4_accuracy"]
    for (model, proxy), accuracy in printed.items():
        label = {"llava_7b": "LLaVA-7B", "llava_13b": "LLaVA-13B"}[model]
        row = next(cells(line) for line in text.splitlines() if f"{label}, {proxy}*" in line)
        assert row[2] == f"*{accuracy:.2f}*"


def test_the_csv_is_long_and_same_records_give_the_same_bytes(
    records: list[Record], tmp_path: Path
) -> None:
    runs = str(records[0].path.parent)
    written = []
    for out in ("a", "b"):
        arguments = ["--runs", runs, "--out", str(tmp_path / out), "--command", "make table1"]
        assert table1.main(arguments) == 0
        written.append([(tmp_path / out / f"table1.{end}").read_bytes() for end in ("csv", "md")])
    assert written[0] == written[1]
    frame = pd.read_csv(tmp_path / "a" / "table1.csv")
    assert tuple(frame.columns) == COLUMNS
    assert frame.set_index("method").loc[VEO, "paper_method"] == "QLoRA+VEO"
    assert pd.isna(frame.set_index("method").loc["Layer-wise", "paper_accuracy"])


def test_a_row_without_proof_is_refused(tmp_path: Path, records: list[Record]) -> None:
    bad = [{**row, "input_levels": 65536} for row in records[2].layers]
    record = make_record(tmp_path, VEO, accuracy=99, layers=bad, name="bad", weights="w")
    kept = [r for r in records if r.method != VEO]
    selection = select([*kept, record], table1.TABLE.wanted)
    assert [entry.record.name for entry in selection.refused] == ["bad"]
    assert "bad" in table1.TABLE.render(selection, "x").partition("## Refused rows")[2]


def test_a_folder_without_records_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert table5.main(["--runs", str(tmp_path / "none")]) == 2
    assert "experiment=table5" in capsys.readouterr().err

"""Table 2 of a real language model: its records only, and nowhere else."""

from pathlib import Path

import pytest

from qvlm.records.record import find_records
from qvlm.report.content import Content
from qvlm.tables import table2, table2_real
from qvlm.tables.labels import CDM, REAL
from qvlm.tables.selection import select
from tests.helpers.pages import cells
from tests.helpers.records import make_record


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Records of the real model and of a miniature."""
    folder = tmp_path / "runs"
    for model in (REAL, "mini_llava"):
        for method in ("FP", "QLoRA", CDM):
            bits = "FP" if method == "FP" else "W4A4"
            make_record(folder, method, bits, model, name=f"{model}-{method[:5].lower()}")
    make_record(folder, "RTN", "W4A4", REAL, name=f"{REAL}-ranked", evaluation={"scoring": "rank"})
    return folder


def test_each_page_has_its_own_models(runs: Path) -> None:
    records = find_records(runs)
    shown = {
        table.name: {(r.model, r.method) for r in select(records, table.wanted).shown}
        for table in (table2.TABLE, table2_real.TABLE)
    }
    assert shown["table2_real"] == {(REAL, "FP"), (REAL, "QLoRA"), (REAL, CDM)}
    assert {model for model, _ in shown["table2"]} == {"mini_llava"}


def test_the_report_shows_it_beside_the_others(runs: Path) -> None:
    shown = {record.model for record in Content.of(find_records(runs)).records}
    assert shown == {REAL, "mini_llava"}


def test_the_page_says_what_guessing_gives(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    assert table2_real.main(["--runs", str(runs), "--out", str(out), "--tracking", "off"]) == 0
    text = (out / "table2_real.md").read_text(encoding="utf-8")
    choices = find_records(runs)[0].predictions["n_choices"]
    assert f"A random choice is right for {100 * (1 / choices).mean():.1f} %" in text
    rows = [cells(line)[0] for line in text.splitlines() if line.startswith("| **")]
    assert rows == ["**FP**", "**QLoRA**", f"**{CDM}**"]

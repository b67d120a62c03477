"""The audit finds what can be found by hand, and the committed page is what it prints."""

import re
from pathlib import Path

import pytest

from qvlm.tables import audit
from tests.helpers.pages import cells, section

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def page() -> str:
    return audit.page("make audit")


def lines(text: str) -> list[list[str]]:
    return [cells(line) for line in text.splitlines() if line.startswith("| ")][2:]


def test_the_committed_page_is_what_the_audit_prints(page: str) -> None:
    assert (ROOT / "results" / "audit.md").read_text(encoding="utf-8") == page


def test_six_averages_are_weighted_by_hand(page: str) -> None:
    found = lines(section(page, "## Averages beside their own classes"))
    assert len(found) == 6
    for *_, terms, printed, computed, gap, _ in found:
        parts = re.findall(r"([0-9]+) x ([0-9.]+)", terms)
        assert [int(n) for n, _ in parts] == [2252, 889, 1100]
        mean = sum(int(n) * float(value) for n, value in parts) / 4241
        assert float(computed) == pytest.approx(mean, abs=0.005)
        assert float(gap) == pytest.approx(float(printed) - mean, abs=0.005)
    assert [row[6] for row in found] == ["-0.29", "-0.37", "+0.19", "-0.11", "-0.20", "-0.51"]


def test_full_precision_has_46_right_answers_fewer(page: str) -> None:
    found = lines(section(page, "## Full precision beside published answers"))
    assert found[-1] == ["Avg", "4241", "90.00", "3817", "91.09", "3863", "-46"]
    assert [row[-1] for row in found[:3]] == ["-9", "-25", "-18"]
    assert "46 right answers fewer" in page
    assert "90.19 to 91.91" in page


def test_no_number_of_right_answers_gives_what_is_listed(page: str) -> None:
    found = lines(section(page, "## Accuracies that no number of right answers gives"))
    sizes = {"NAT": 2252, "SOC": 889, "LAN": 1100, "TXT": 2046, "IMG": 2017, "NO": 1435}
    assert audit.class_sizes() == {**sizes, "Avg": 4241}
    named = {audit.label("llava_7b"), audit.label("llava_13b"), audit.label("moe_llava")}
    assert {row[0] for row in found} == named
    table = audit.published("table2")
    table["label"] = [audit.label(model) for model in table["model"]]
    count = 0
    for row in audit.rows(table):
        possible = {
            name: {f"{100 * right / size:.2f}" for right in range(size + 1)}
            for name, size in audit.class_sizes().items()
        }
        off = [name for name in possible if f"{row[name]:.2f}" not in possible[name]]
        listed = [r for r in found if r[:3] == [row["label"], row["bits"], row["method"]]]
        assert (listed[0][4].split(", ") if listed else []) == off
        count += bool(off)
    assert len(found) == count == 13


def test_ratios_are_divided_by_hand(page: str) -> None:
    memory, time = lines(section(page, "## Ratios in the text beside their table"))
    assert memory == ["memory", "2.78x", "24 / 9.6", "2.50x", "26.7 G"]
    assert time == ["time", "1.44x", "12.9 / 8.9", "1.45x", "12.8 h"]


def test_tables_are_compared_with_each_other(page: str) -> None:
    found = lines(section(page, "## One setting in several tables"))
    assert found == [
        ["LLaVA-13B", "W8A8", "Q-VLM", "accuracy", "89.82 in Table 4", "89.81 in Table 6", "-0.01"]
    ]
    assert "15 values stand in more than one table. 14 agree" in page


def test_gains_stand_beside_their_noise(page: str) -> None:
    found = lines(section(page, "## What the differences can show"))
    assert len(found) == 12
    row = next(r for r in found if r[:3] == ["LLaVA-13B", "W6A6", "Q-VLM - QLoRA"])
    # 1.96 sqrt((0.897 x 0.103 + 0.8887 x 0.1113) / 4241), and 1.96 sqrt(0.1 / 4241).
    assert row[3:] == ["+0.83", "35", "+-1.32", "+-0.95"]


def test_the_command_writes_the_page(
    page: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.main(["--out", str(tmp_path), "--command", "make audit"]) == 0
    assert (tmp_path / "audit.md").read_text() == page == capsys.readouterr().out

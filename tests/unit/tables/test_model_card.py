"""The model card's numbers follow from the committed answers of Table 2."""

import shutil
from pathlib import Path

from qvlm.tables.answers import folder_of, read_answers
from qvlm.tables.model_card import BEGIN, CARD, END, with_part
from qvlm.tables.verify import PAGES, check
from tests.helpers.pages import cells

ROOT = Path(__file__).resolve().parents[3]
(PAGE,) = (page for page in PAGES if page.name.endswith("miniature/README"))


def test_the_card_shows_the_committed_answers() -> None:
    assert check(PAGE, ROOT / "results") == []


def test_accuracy_is_that_of_the_answers() -> None:
    records = read_answers(folder_of(ROOT / "results", "table2"))
    made = with_part(f"{BEGIN}\n{END}", records)
    assert made is not None
    rows = {line[0]: line[1:] for line in map(cells, made.splitlines()) if line}
    (full,) = (r for r in records if r.model == "mini_moe_llava" and r.method == "FP")
    right = full.predictions[full.predictions["skill"] == "Read a bar chart"]["correct"]
    assert rows["Read a bar chart"][1] == f"{100 * right.mean():.1f}"
    assert rows["Avg"][1].startswith(f"{100 * full.predictions['correct'].mean():.1f} (")
    assert with_part("a card without the marks", records) is None


def test_a_changed_number_of_the_card_is_found(tmp_path: Path) -> None:
    results = tmp_path / "results"
    assert check(PAGE, results) == []
    shutil.copytree(folder_of(ROOT / "results", "table2"), folder_of(results, "table2"))
    card = tmp_path / CARD
    card.parent.mkdir(parents=True)
    text = (ROOT / CARD).read_text(encoding="utf-8")
    card.write_text(text.replace("| Avg   | 90.8", "| Avg   | 90.9"), encoding="utf-8")
    found = check(PAGE, results)
    assert found
    assert "90.9" in str(found[0])

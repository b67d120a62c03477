"""The part of the README on Table 2 follows from its CSV."""

from pathlib import Path

from qvlm.tables.readme import BEGIN, END, block, with_block
from qvlm.tables.verify import PAGES, check
from tests.helpers.pages import cells

ROOT = Path(__file__).resolve().parents[3]
CSV = """\
model,bits,method,class,n,accuracy,ci_low,ci_high,unparsable
a,FP,FP,Avg,100,90.00,83.00,94.00,0.00
a,FP,FP,IMG,50,10.00,1.00,90.00,9.00
a,W6A6,RTN,Avg,100,89.00,82.00,93.00,0.10
a,W6A6,AWQ,Avg,100,89.50,82.00,93.00,0.10
a,W4A4,RTN,Avg,100,80.00,71.10,86.70,0.50
a,W4A4,AWQ,Avg,100,82.50,74.00,88.00,0.20
a,W4A4,RoCo,Avg,100,79.96,71.00,87.00,0.20
"""


def test_averages_stand_in_a_table() -> None:
    text = block(CSV)
    rows = [cells(line) for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == ["method", "a W6A6", "a W4A4"]
    assert rows[2:] == [
        ["full precision", "90.00", ""],
        ["RTN", "89.00", "80.00"],
        ["AWQ", "89.50", "82.50"],
    ]  # RoCo was not measured at W6A6 and is left to the page
    said = " ".join(text.split())
    assert "at most 9.0 points to either side" in said
    assert "at most 0.50 %" in said
    assert "a, W4A4: rounding to nearest loses 10.0 points. Over that, AWQ +2.5." in said


def test_only_the_part_between_the_marks_is_made_anew() -> None:
    readme = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    made = with_block(readme, CSV)
    assert made == f"before\n{BEGIN}\n\n{block(CSV)}\n\n{END}\nafter\n"
    assert with_block(made, CSV) == made
    assert with_block("before\n", CSV) is None


def test_the_readme_shows_the_committed_table() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_block(text, (ROOT / "results" / "table2.csv").read_text(encoding="utf-8")) == text


def test_a_changed_number_of_the_readme_is_found(tmp_path: Path) -> None:
    (page,) = (page for page in PAGES if page.name == "../README")
    results = tmp_path / "results"
    results.mkdir()
    assert check(page, results) == []
    (results / "table2.csv").write_text(CSV)
    made = with_block(f"{BEGIN}\n{END}\n", CSV)
    assert made is not None
    (tmp_path / "README.md").write_text(made)
    assert check(page, results) == []
    (tmp_path / "README.md").write_text(made.replace("82.50", "82.51"))
    (found,) = check(page, results)
    assert (found.printed, found.computed) == ("82.51", "82.50")
    assert "row AWQ, column a W4A4" in found.place

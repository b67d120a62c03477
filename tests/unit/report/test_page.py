"""The page is one small file that needs nothing else, and its numbers are those of the records."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from qvlm.evaluation.metrics import CLASSES
from qvlm.records.record import Record
from qvlm.report.__main__ import main
from qvlm.report.content import Content
from qvlm.report.page import page
from qvlm.tables.published import table2_values
from tests.helpers.records import make_layers, make_record
from tests.helpers.sensitivity import planted_rows

pytestmark = pytest.mark.slow


class Tables(HTMLParser):
    """The cells of the sortable tables: their text, and the value that they are sorted by."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[dict[str, str]]]] = []
        self.inside = False
        self.cell: dict[str, str] | None = None
        self.small = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "table":
            self.inside = given.get("class") == "sortable"
            self.tables += [[]] if self.inside else []
        elif self.inside and tag == "tr":
            self.tables[-1].append([])
        elif self.inside and tag in ("td", "th"):
            self.cell = {"text": "", "paper": "", "below": "", **given}
            self.tables[-1][-1].append(self.cell)
        elif tag == "small":
            self.small = given.get("class", "below")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.cell = None
        elif tag == "small":
            self.small = ""

    def handle_data(self, data: str) -> None:
        if self.cell is not None:
            self.cell[self.small or "text"] += data.strip()


def records(folder: Path) -> list[Record]:
    """Full precision, three methods at two bit widths, and one whose bits are false."""
    layers = make_layers("W4A4")
    layers[1]["input_levels"] = 17
    cells = [
        *(("RTN", "W6A6", 90), ("AWQ", "W6A6", 89), ("Q-VLM", "W6A6", 90)),
        *(("RTN", "W4A4", 60), ("AWQ", "W4A4", 55), ("Q-VLM", "W4A4", 80)),
    ]
    return [
        make_record(folder, bits="FP", accuracy=91, n=300, generated=True),
        *(
            make_record(folder, method, bits, accuracy=accuracy, n=300, seed=seed, generated=True)
            for seed, (method, bits, accuracy) in enumerate(cells, 1)
        ),
        make_record(folder, "QLoRA", layers=layers, n=300, generated=True),
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Records that are made once."""
    return records(tmp_path_factory.mktemp("results") / "runs")


@pytest.fixture(scope="module")
def text(made: list[Record]) -> str:
    """Their page."""
    return page(made, "make report")


def test_every_number_of_the_table_is_the_records(made: list[Record], text: str) -> None:
    content = Content.of(made)
    header, *rows = Tables(text).tables[0]
    assert [cell["text"] for cell in header][2:11] == list(CLASSES)
    assert len(rows) == 7
    printed = table2_values("llava_13b")
    by_cell = {(r.method, r.bits): r for r in made}
    full = made[0].predictions["correct"].mean()
    for row in rows:
        record = by_cell[row[0]["text"], row[1]["text"]]
        for name, cell in zip(CLASSES, row[2:], strict=False):
            accuracy = record.metrics["classes"][name]["accuracy"]
            assert cell["text"] == f"{accuracy:.2f}"
            assert float(cell["data-sort"]) == accuracy
            assert cell["data-run"] == str(content.numbers[record.name])
            paper = printed.get((record.bits, record.method), {}).get(name)
            assert cell["paper"] == ("" if paper is None else f"{paper:.2f}")
        if record.method != "FP":
            lost = 100 * (record.predictions["correct"].mean() - full)
            assert float(row[11]["data-sort"]) == pytest.approx(lost)
            both = [r.predictions["prediction"].fillna(-1) for r in (record, made[0])]
            assert float(row[12]["data-sort"]) == pytest.approx(100 * (both[0] != both[1]).mean())


def test_the_page_needs_nothing_else(text: str) -> None:
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]*\"", text)
    assert "@import" not in text
    assert "url(" not in text
    assert len(text.encode()) < 5 * 2**20
    ids = re.findall(r"\sid=\"([^\"]+)\"", text)
    assert len(ids) == len(set(ids))
    assert {*re.findall(r"href=\"#([^\"]+)\"", text)} <= {*ids}


def test_the_page_is_a_function_of_the_records(made: list[Record], text: str) -> None:
    assert page(made[::-1], "make report") == text


def test_a_refused_row_is_red_and_says_why(text: str) -> None:
    assert text.count('<i class="bad"') == 1
    assert "1 refused" in text
    assert "17 input values per scale, 16 allowed" in text
    assert "QLoRA" not in "".join(cell["text"] for row in Tables(text).tables[0] for cell in row)


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script>'
    made = [make_record(tmp_path, evil, n=20, name="a"), make_record(tmp_path, bits="FP", n=20)]
    text = page(made, evil)
    assert "<script>alert" not in text
    assert text.count("<script>") == 1


def test_what_is_not_measured_is_said(tmp_path: Path) -> None:
    text = page([make_record(tmp_path, n=20)], "make report")
    assert "Not measured: there is neither a record of packed execution nor Table 4." in text
    assert "Not measured for mini_llava, RTN W4A4: these records hold no errors by layer." in text
    assert "Not measured: no model has records of two bit widths." in text
    assert "Not measured: there is no sensitivity.csv" in text


def test_table_4_is_read_where_it_is(made: list[Record]) -> None:
    results = made[0].path.parents[1]
    rows = [
        dict(model="mini_llava", bits=b, method=m, accuracy=a, weight_gib=w, seconds_per_question=s)
        for b, m, a, w, s in [("FP", "FP", 91.0, 0.004, 0.5), ("W4A4", "AWQ", 55.0, 0.001, 0.25)]
    ]
    text = page(made, "make report", pd.DataFrame(rows))
    assert "AWQ W4A4: 1.02 MiB of weights, 55.00 %" in text
    assert "AWQ W4A4: 4 questions per second, 55.00 %" in text
    pd.DataFrame(rows).to_csv(results / "table4.csv", index=False)
    assert main(["--results", str(results), "--command", "make report"]) == 0
    assert (results / "report" / "index.html").read_text(encoding="utf-8") == text


def test_sensitivity_is_read_where_it_is(made: list[Record], tmp_path: Path) -> None:
    rows = planted_rows()
    text = page(made, "make report", sensitivity=rows)
    alone = rows[(rows["part"] == "attention") & (rows["operands"] == "both")].iloc[0]
    assert f"attention, quantized alone: {alone['kl']:.4f} ({alone['kl_low']:.4f} to" in text
    assert "decoder 0, saved if left in floating point: 0.0" in text
    assert "mini_llava rtn W4A4; everything quantized: 0.0" in text
    assert "Not measured: there is no sensitivity.csv" not in text
    shutil.copytree(made[0].path.parents[1], tmp_path / "results")
    rows.to_csv(tmp_path / "results" / "sensitivity.csv", index=False)
    assert main(["--results", str(tmp_path / "results")]) == 0
    written = (tmp_path / "results" / "report" / "index.html").read_text(encoding="utf-8")
    assert "attention, quantized alone" in written


def test_a_folder_without_records_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: --results: {tmp_path / 'runs'} holds no records. Give the results_dir of a run.\n"
    )

"""The report in a real browser: Chromium, driven by Playwright where both are installed."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from qvlm.evaluation.metrics import CLASSES
from qvlm.records.record import Record
from qvlm.report.__main__ import write
from tests.helpers.records import make_layers, make_record

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("there is no Chromium on this machine", allow_module_level=True)
COUNT = 300


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Full precision, three methods, and one whose bits are false."""
    runs = tmp_path_factory.mktemp("results") / "runs"
    layers = make_layers("W4A4")
    layers[1]["input_levels"] = 17
    cells = [("RTN", "W6A6", 90), ("RTN", "W4A4", 60), ("AWQ", "W4A4", 55), ("Q-VLM", "W4A4", 80)]
    return [
        make_record(runs, bits="FP", accuracy=91, n=COUNT, generated=True),
        *(
            make_record(runs, method, bits, accuracy=accuracy, n=COUNT, seed=seed, generated=True)
            for seed, (method, bits, accuracy) in enumerate(cells, 1)
        ),
        make_record(runs, "QLoRA", layers=layers, n=COUNT, generated=True),
    ]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(records: list[Record], browser: Any) -> Iterator[Any]:
    """The report of the records, opened from disk. Whatever the console shows fails the test."""
    file = records[0].path.parents[1] / "report" / "index.html"
    if not file.exists():
        write(records[0].path.parents[1], "make report")
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    asked: list[str] = []
    opened.goto(file.as_uri())
    yield opened
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    opened.close()


def column(page: Any, number: int) -> list[str]:
    """The texts of a column of Table 2, without the small numbers below them."""
    found: list[str] = page.evaluate(
        "n => [...document.querySelector('table.sortable').tBodies[0].rows]"
        ".map(row => row.cells[n].firstChild.textContent.trim())",
        number,
    )
    return found


def choose(page: Any, label: str) -> Any:
    """The choice of a filter."""
    return page.locator(f"label:has-text('{label}') select").first


def test_numbers_are_shown_and_sorted(page: Any, records: list[Record]) -> None:
    shown = {
        (method, bits): text
        for method, bits, text in zip(*map(column, [page] * 3, (0, 1, 10)), strict=True)
    }
    assert shown == {
        (r.method, r.bits): f"{r.metrics['classes']['Avg']['accuracy']:.2f}"
        for r in records
        if r.method != "QLoRA"
    }
    head = (
        page.locator("table.sortable").first.locator("thead th").nth(2 + list(CLASSES).index("Avg"))
    )
    head.get_by_role("button").click()
    down = [float(text) for text in column(page, 10)]
    assert down == sorted(down, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    head.get_by_role("button").press("Enter")
    assert [float(text) for text in column(page, 10)] == down[::-1]
    assert head.get_attribute("aria-sort") == "ascending"


def test_every_number_says_where_it_comes_from(page: Any, records: list[Record]) -> None:
    card = page.locator("#card")
    assert card.is_hidden()
    cell = page.locator("table.sortable tbody tr", has_text="AWQ").first.locator("td").nth(1)
    cell.hover()
    record = next(r for r in records if r.method == "AWQ")
    row = record.metrics["classes"]["NAT"]
    text = card.inner_text()
    assert f"AWQ W4A4, NAT: {row['accuracy']:.2f} % of {row['n']} questions" in text
    for part in (record.name, "python run.py", "0123456789abcdef", "torch 2.13.0", "Some CPU"):
        assert part in text
    assert "Seed" in text
    page.mouse.move(2, 2)
    assert card.is_hidden()
    button = page.locator("table.sortable").first.get_by_role("button", name="AWQ")
    button.focus()  # the keyboard alone shows, keeps and closes it
    assert record.name in card.inner_text()
    page.keyboard.press("Enter")
    page.mouse.move(400, 2)
    assert card.is_visible()
    page.keyboard.press("Escape")
    assert card.is_hidden()
    assert button.evaluate("e => e === document.activeElement")


def test_charts_are_walked_with_arrow_keys(page: Any, records: list[Record]) -> None:
    plot = page.locator(".plot").first
    stops = plot.locator('.point[tabindex="0"]')
    assert stops.count() == 1
    stops.focus()
    first = page.locator("#card .value").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator("#card .value").inner_text() != first
    assert stops.count() == 1
    labels = plot.locator(".point").evaluate_all("all => all.map(e => e.ariaLabel)")
    accuracy = records[0].metrics["classes"]["NAT"]["accuracy"]
    assert any(label.startswith(f"NAT: FP {accuracy:.2f} %") for label in labels)


def test_questions_are_filtered(page: Any, records: list[Record]) -> None:
    shown = page.locator(".question:visible")
    assert shown.count() == 24
    total = page.locator(".question").count()
    assert total >= 200
    broken = page.evaluate(
        "() => Promise.all([...document.querySelectorAll('.question img')].map(image =>"
        " image.decode().then(() => image.naturalWidth - image.getAttribute('width'), () => 1)))"
    )
    assert len(broken) > 50
    assert not any(broken)
    page.get_by_role("button", name="Show more").click()
    assert shown.count() == 48

    by_name = {(r.method, r.bits): r for r in records}
    full, low = by_name["FP", "FP"], by_name["AWQ", "W4A4"]
    choose(page, "Method").select_option(label="mini_llava, AWQ W4A4")
    choose(page, "Answers").select_option("lost")
    ids = page.locator(".question").evaluate_all("all => all.map(e => e.dataset.id)")
    right = [
        r.predictions.set_index("question_id")["correct"].astype(bool)[ids] for r in (full, low)
    ]
    lost = int((right[0] & ~right[1]).sum())
    assert lost > 24
    assert page.locator(".count").inner_text() == f"24 of {lost} questions shown"
    for name in shown.evaluate_all("all => all.map(e => e.dataset.id)"):
        assert right[0][name]
        assert not right[1][name]

    page.get_by_role("button", name="Clear").click()
    choose(page, "Class").select_option("SOC")
    social = CLASSES["SOC"](full.predictions.set_index("question_id").loc[ids])
    assert page.locator(".count").inner_text().endswith(f" of {int(social.sum())} questions shown")
    skill = choose(page, "Skill").locator("option").nth(1).inner_text()
    choose(page, "Class").select_option("")
    choose(page, "Skill").select_option(skill)
    assert {*shown.evaluate_all("all => all.map(e => e.dataset.skill)")} == {skill}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1600])
def test_it_fits_every_screen(page: Any, scheme: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colors = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    bright = [sum(map(int, c[4:-1].split(","))) / 3 for c in colors]
    assert (bright[0] > bright[1]) == (scheme == "dark")
    assert abs(bright[0] - bright[1]) > 150
    page.get_by_role("button", name="Theme").click()  # from automatic to light, whatever the system
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"

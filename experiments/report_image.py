"""Takes the pictures of the report that the docs show.

`python experiments/report_image.py` opens `results/report/index.html` in Chromium and writes
`docs/images/report.png` and `docs/images/report-questions.png`. It needs the package playwright and
Debian's chromium, or any other of its kind that --browser names.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from qvlm.command import run_command
from qvlm.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
# Files with the selector of what is at the top of each.
SHOWN = {"report.png": "#tables", "report-questions.png": "#questions"}
WIDTH, HEIGHT = 1240, 760


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--report", type=Path, default=ROOT / "results/report/index.html")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images", help="folder")
    parser.add_argument("--browser", default=shutil.which("chromium"), help="Chromium's program")
    return run_command(parser, work, arguments)


def work(options: argparse.Namespace) -> None:
    """Writes the pictures."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise UserError("playwright is not installed. Give `pip install playwright`.") from error
    if options.browser is None or not options.report.is_file():
        raise UserError("--browser or --report is not there. Give `make report` and a Chromium.")
    options.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=options.browser, args=["--no-sandbox", "--hide-scrollbars"]
        )
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(options.report.resolve().as_uri())
        page.locator("select[name=outcome]").first.select_option("lost")
        for name, selector in SHOWN.items():
            page.eval_on_selector(selector, "element => element.scrollIntoView()")
            page.screenshot(path=options.out / name)
            print(f"wrote {options.out / name}")
        browser.close()


if __name__ == "__main__":
    sys.exit(main())

"""Copies the pages, and every file that they link to, where `make docs` builds the site from.

    python docs/stage.py build/docs

The copy has the repository's layout, so that a link means the same in the site as in the
repository. A link that leads nowhere is left for mkdocs to refuse.
"""

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")


def linked(page: Path) -> set[Path]:
    """The files of the repository that a page links to."""
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    paths = {(page.parent / link).resolve() for link in links if "://" not in link}
    return {path for path in paths if path.is_file() and path.is_relative_to(ROOT)}


def main(target: Path) -> None:
    """Makes the folder anew."""
    shutil.rmtree(target, ignore_errors=True)
    waiting = [*(ROOT / name for name in TOP), *(ROOT / "docs").glob("*.md")]
    copied: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in copied:
            continue
        copied.add(path)
        place = target / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
        if path.suffix == ".md":
            waiting += linked(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

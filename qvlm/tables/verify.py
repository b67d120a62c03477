"""`python -m qvlm verify`: every number of the committed pages, computed again from the answers.

Each page is made anew from the answers that are committed with it (`qvlm.tables.answers`), by the
functions that made it from records, and the two texts are compared. No model runs, so this takes
less than a minute. What a cell measured, such as its seconds of search, is compared with the
committed facts of the cell. The page of sensitivities is made anew from its CSV, which is a
measurement itself. The pages of speed (`table4_scale`, `peers_*`, `gpu`) and of outliers are
measurements of a machine, and `table2_clusters` is of an earlier version. They are not checked.

    python -m qvlm verify               all pages
    python -m qvlm verify --rerun 2     runs two of their cells anew, too, and compares the answers
    python -m qvlm verify --write       writes what the answers give, after a change of wording
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qvlm.command import folder, run_command
from qvlm.errors import RunError
from qvlm.records.record import Record
from qvlm.records.strict import build
from qvlm.tables import (
    ablation,
    audit,
    calibration,
    claims,
    model_card,
    readme,
    table1,
    table2,
    table2_real,
    table5,
    table6,
    table_real,
)
from qvlm.tables.answers import folder_of, read_answers, read_facts
from qvlm.tables.command import Table, texts_of, write_files
from qvlm.tables.differences import Difference, differences
from qvlm.tables.selection import select
from qvlm.tables.sensitivity.page import page as sensitivity_page
from qvlm.tables.sensitivity.rows import CSV, read
from qvlm.tables.table4 import facts as table4_facts
from qvlm.tables.table4 import page as table4_page
from qvlm.validation import whole_number

_COMMAND = re.compile(r"^- Command: `(.+)`$", re.M)
_SHOWN = 20  # differences of a page that are printed


@dataclass(frozen=True)
class Page:
    """A committed page and how it follows from committed data.

    Attributes:
        name: Name of its file without the suffix, and of its folder of answers.
        render: Function that returns the texts of its files, by their paths in the folder of
            results, for that folder and the command that the page names.
        answered: Whether it is made of committed answers.
    """

    name: str
    render: Callable[[Path, str], Mapping[str, str]]
    answered: bool = True


def _of(table: Table) -> Page:
    def render(results: Path, command: str) -> Mapping[str, str]:
        records = read_answers(folder_of(results, table.name))
        return texts_of(table, select(records, table.wanted), command)

    return Page(table.name, render)


def _table4(results: Path, command: str) -> Mapping[str, str]:
    place = folder_of(results, "table4")
    records = {record.name: record for record in read_answers(place)}
    try:
        facts = build(table4_facts.Facts, read_facts(place), "facts")
        return table4_page.texts_of(facts, records, command)
    except (ValueError, KeyError) as error:
        raise RunError(f"{place}: {error} is not what a page wrote; make the page anew") from error


def _by(name: str, texts: Callable[[Sequence[Record], str], Mapping[str, str]]) -> Page:
    """A page that is a function of the answers of its folder."""

    def render(results: Path, command: str) -> Mapping[str, str]:
        return texts(read_answers(folder_of(results, name)), command)

    return Page(name, render)


def _audit(results: Path, command: str) -> Mapping[str, str]:
    return {"audit.md": audit.page(command)}


def _readme(results: Path, command: str) -> Mapping[str, str]:
    """The README beside the folder of results, if it has a part on Table 2."""
    place, csv = results.parent / "README.md", results / "table2.csv"
    if not (place.is_file() and csv.is_file()):
        return {}
    text = readme.with_block(place.read_text(encoding="utf-8"), csv.read_text(encoding="utf-8"))
    return {} if text is None else {"../README.md": text}


def _model_card(results: Path, command: str) -> Mapping[str, str]:
    """The card of the embedded models beside the folder of results, if Table 2 is of them."""
    place, answers = results.parent / model_card.CARD, folder_of(results, table2.TABLE.name)
    if not (place.is_file() and answers.is_dir()):
        return {}
    text = model_card.with_part(place.read_text(encoding="utf-8"), read_answers(answers))
    return {} if text is None else {f"../{model_card.CARD}": text}


def _sensitivity(results: Path, command: str) -> Mapping[str, str]:
    rows = read(results)
    if rows is None:
        raise RunError(f"{results / CSV} is missing; make the page anew")
    return {"sensitivity.md": sensitivity_page(rows, command)}


PAGES = (
    *map(_of, (table1.TABLE, table2.TABLE, table2_real.TABLE, table5.TABLE, ablation.TABLE)),
    Page("table4", _table4),
    _by(table6.NAME, table6.texts_of),
    _by(table_real.NAME, table_real.texts_of),
    _by(calibration.NAME, calibration.texts_of),
    _by("claims", claims.texts_of),
    Page("audit", _audit, answered=False),
    Page("sensitivity", _sensitivity, answered=False),
    Page("../README", _readme, answered=False),
    Page(f"../{model_card.CARD.with_suffix('')}", _model_card, answered=False),
)


def check(page: Page, results: Path, write: bool = False) -> list[Difference]:
    """Compares the files of a page with what its answers give.

    Args:
        page: Page to check.
        results: Folder of the page.
        write: Whether to write what the answers give. Then nothing differs any more.

    Raises:
        RunError: If the answers are damaged, or of problems that are no longer generated.
        UserError: If a file cannot be written.
    """
    file = results / f"{page.name}.md"
    printed = file.read_text(encoding="utf-8") if file.is_file() else ""
    if page.answered and not folder_of(results, page.name).is_dir():
        absent = Difference(file.name, "a page without committed answers", "nothing")
        return [absent] if printed else []
    if not page.answered and not printed:
        return []  # results of somebody's own
    named = _COMMAND.search(printed)
    texts = page.render(results, named[1] if named else f"make {page.name}")
    if write:
        write_files({results / name: text for name, text in texts.items()})
        return []
    found = []
    for name, text in texts.items():
        path = results / name
        found += differences(name, path.read_text("utf-8") if path.is_file() else "", text)
    return found


def _count(found: Sequence[Difference]) -> str:
    """Returns how many values differ in words, or "" if none does."""
    many = f"{len(found)} values differ" if found[1:] else "1 value differs"
    return many if found else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m qvlm verify",
        description="Computes every number of the committed pages again from their answers.",
    )
    parser.add_argument(
        "--results",
        type=folder,
        default=Path("results"),
        help="folder of the pages (default: %(default)s)",
    )
    parser.add_argument(
        "--rerun",
        type=int,
        default=0,
        metavar="N",
        help="also run N random cells anew and compare their answers",
    )
    parser.add_argument("--write", action="store_true", help="write what the answers give")

    def work(options: argparse.Namespace) -> None:
        whole_number("--rerun", options.rerun, 0)
        found: list[Difference] = []
        for page in PAGES:
            own = check(page, options.results, options.write)
            made = (options.results / f"{page.name}.md").is_file()
            source = "its answers" if page.answered else "committed files"
            good = f"every value follows from {source}" if made else "not made"
            print(f"{page.name.removeprefix('../')}: {_count(own) or good}")
            for difference in own[:_SHOWN]:
                print(f"  {difference}")
            found += own
        if options.rerun:
            from qvlm.tables.rerun import rerun

            found += rerun([folder_of(options.results, page.name) for page in PAGES], options.rerun)
        if found:
            raise RunError(f"{_count(found)}, the first in {found[0]}")

    return run_command(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())

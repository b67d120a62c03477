"""Where a committed page differs from what its answers give: the line, the row, the column."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

ABSENT = "nothing"


@dataclass(frozen=True)
class Difference:
    """A value of a page that differs.

    Attributes:
        place: File and line, and in a table also its row and column.
        printed: Value that the file has.
        computed: Value that follows from the answers.
    """

    place: str
    printed: str
    computed: str

    def __str__(self) -> str:
        return f"{self.place}: {self.printed} is printed, {self.computed} follows"


def differences(name: str, printed: str, computed: str) -> list[Difference]:
    """Compares a file with what it should be.

    Args:
        name: Name of the file as messages show it. One that ends in ".csv" is compared as such, any
            other as Markdown.
        printed: Text of the file.
        computed: Text that it should have.

    Returns:
        Differences in the order of the file, one per value that differs in a table. Empty only if
        the texts are equal.
    """
    if printed == computed:
        return []
    found = list(
        _csv(name, printed, computed)
        if name.endswith(".csv")
        else _markdown(name, printed, computed)
    )
    return found or [Difference(name, "another end of a line", "what make writes")]


def _csv(name: str, printed: str, computed: str) -> Iterator[Difference]:
    tables = (list(csv.reader(io.StringIO(text))) for text in (printed, computed))
    header: list[str] = []
    for number, (a, b) in enumerate(zip_longest(*tables), 1):
        header = header or a or []
        yield from _row(f"{name}, line {number}", header, a, b, 3)


def _markdown(name: str, printed: str, computed: str) -> Iterator[Difference]:
    header: list[str] = []
    title = ""
    for number, (a, b) in enumerate(zip_longest(printed.splitlines(), computed.splitlines()), 1):
        place = f"{name}, line {number}"
        cells = [_cells(line) if line and line.startswith("|") else None for line in (a, b)]
        if cells[0] is None:
            header, title = [], ""
        elif not header:
            header = cells[0]
        if cells[0] is None or cells[1] is None:
            if a != b:
                yield Difference(place, _shown(a), _shown(b))
            continue
        # A row without a name of its own belongs to the one above it.
        title = cells[0][0] or title
        yield from _row(f"{place}, row {title}", header, cells[0], cells[1], 0)


def _row(
    place: str, header: Sequence[str], a: list[str] | None, b: list[str] | None, named: int
) -> Iterator[Difference]:
    """Compares two rows of a table.

    Args:
        place: File, line and row.
        header: Titles of the columns.
        a: Printed row, or None.
        b: Computed row, or None.
        named: Number of columns that name the row, which are added to `place`.
    """
    if a is None or b is None:
        yield Difference(place, *(_shown(", ".join(row or [])) for row in (a, b)))
        return
    if named:
        place += f", row {' '.join(a[:named])}"
    for index, (printed, computed) in enumerate(zip_longest(a, b)):
        if printed != computed:
            column = header[index] if index < len(header) else ""
            title = f"column {column}" if column else f"column {index + 1}"
            yield Difference(f"{place}, {title}", _shown(printed), _shown(computed))


def _cells(line: str) -> list[str]:
    """Returns the cells of a line of a Markdown table; an escaped pipe is part of a cell."""
    inner = line.strip().removeprefix("|").removesuffix("|").replace("\\|", "\0")
    return [cell.strip().replace("\0", "|") for cell in inner.split("|")]


def _shown(value: str | None) -> str:
    if not value:
        return ABSENT
    return value if len(value) <= 60 else f"{value[:57]}..."

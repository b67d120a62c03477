"""Pages of tables, and the parts of their Markdown."""

from pathlib import Path

from qvlm.records.record import find_records
from qvlm.tables.table2 import write


def table2_page(runs: Path) -> str:
    """Returns the page of Table 2 for a folder of records."""
    _, markdown = write(find_records(runs), runs.parent / "out", "make table2")
    return markdown.read_text()


def section(text: str, title: str) -> str:
    """Returns the text from one heading to the next of the same or a higher level."""
    assert title in text, title
    level = title.partition(" ")[0]
    body = text[text.index(title) + len(title) :].splitlines()
    ends = [i for i, line in enumerate(body) if line.startswith(("# ", "## ", f"{level} "))]
    return "\n".join(body[: ends[0]] if ends else body)


def cells(line: str) -> list[str]:
    """Returns the cells of a line of a Markdown table."""
    return [cell.strip() for cell in line.strip("|").split("|")]

"""Markdown tables whose columns line up in the source text, and lists."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Returns a Markdown table. Each column is padded to its widest cell, and pipes are escaped.

    Args:
        header: Title of each column.
        rows: Cells of each row, one per column.
        left: Number of columns that are aligned to the left. The others are aligned to the right.
    """
    header, *rows = ([cell.replace("|", "\\|") for cell in row] for row in (header, *rows))
    widths = [max(3, *(len(cell) for cell in cells)) for cells in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = [
        ":" + "-" * (width - 1) if column < left else "-" * (width - 1) + ":"
        for column, width in enumerate(widths)
    ]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def bullets(sentences: Sequence[str]) -> str:
    """Returns a list with one item per sentence."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


def replaced(text: str, begin: str, end: str, part: str) -> str | None:
    """Returns a text with what stands between two marks replaced.

    Args:
        text: Text of a page.
        begin, end: Marks, which stay.
        part: What stands between them afterwards, without empty lines around it.

    Returns:
        The text, or None if it lacks one of the marks.
    """
    before, first, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    return f"{before}{begin}\n\n{part}\n\n{end}{after}" if first and last else None

"""Markdown tables that read well raw too: columns padded to their widest cell."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Writes a table.

    Args:
        header: one cell per column.
        rows: as many cells each.
        left: so many columns are aligned left, the others right.
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
    """Writes a list."""
    return "\n".join(f"- {sentence}" for sentence in sentences)

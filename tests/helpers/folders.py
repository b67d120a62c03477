"""What a folder holds."""

from pathlib import Path


def content(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of every file in a folder, by its relative path."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}

"""The command that makes the page of claims from recorded runs."""

from collections.abc import Mapping, Sequence

from qvlm.records.record import Record
from qvlm.tables.claims.analysis import concerned
from qvlm.tables.claims.page import page
from qvlm.tables.command import run_pure


def texts_of(records: Sequence[Record], command: str) -> Mapping[str, str]:
    """Returns the text of the page by the name of its file."""
    return {"claims.md": page(records, command)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    about = "Says which of the paper's claims the records support."
    return run_pure("claims", about, texts_of, concerned, arguments)

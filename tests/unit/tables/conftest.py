"""What the tests of tables share."""

from pathlib import Path

import pytest


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder for records."""
    return tmp_path / "runs"

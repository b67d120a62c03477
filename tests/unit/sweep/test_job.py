"""What a job leaves can be read by the process that asked for it."""

import pickle
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from qvlm.cell import pipeline
from qvlm.sweep.job import Job


class NamedArguments(Exception):
    """As those of httpx are: pickling calls them without what they need."""

    def __init__(self, text: str, *, response: int) -> None:
        super().__init__(f"{text} {response}")


class HoldsLock(Exception):
    """Holds what does not pickle."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    "error",
    [NamedArguments("refused", response=404), HoldsLock("refused 404"), OSError(28, "full")],
)
def test_any_exception_reaches_the_sweep(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "run_cell", broken)
    cell: Any = SimpleNamespace(require_same_code=lambda: None)
    outcome = Job(cell)()
    read = pickle.loads(pickle.dumps(outcome))
    assert str(error) in str(read)
    assert "in broken" in read.__notes__[0]
    assert isinstance(read, OSError) == isinstance(error, OSError)

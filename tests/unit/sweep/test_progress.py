"""The bar over a sweep: how many cells are done, and how long the others will take."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qvlm.sweep import progress
from qvlm.sweep.progress import Cost, SweepProgress


class Clock:
    """A clock that moves when it is told to."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def make_cell(runs: Path, name: str, method: str, limit: int | None = None) -> Any:
    """A cell as the bar sees it; a real one would import PyTorch."""
    config = SimpleNamespace(
        runs_dir=runs,
        method_name=method,
        model=SimpleNamespace(name="toy"),
        evaluation=SimpleNamespace(limit=limit),
    )
    return SimpleNamespace(path=runs / name, config=config)


def record(cell: Any, fixed: float, evaluate: float, questions: int, resumed: int = 0) -> None:
    """Leaves the part of the record that the bar reads."""
    stages: dict[str, Any] = {"quantize": {"seconds": fixed}, "evaluate": {"seconds": evaluate}}
    if resumed:
        stages["evaluate"]["resumed_questions"] = resumed
    run = {
        "files": {},
        "model": "toy",
        "method_name": cell.config.method_name,
        "stages": stages,
        "questions_per_process": [questions // 2, questions - questions // 2],
    }
    cell.path.mkdir(parents=True)
    (cell.path / "run.json").write_text(json.dumps(run))


def test_the_first_cell_tells_how_long(tmp_path: Path, clock: Clock) -> None:
    cells = [make_cell(tmp_path, name, "rtn") for name in "abc"]
    with SweepProgress(cells) as bar:
        assert bar.left() == "the first cell will tell how long"
        clock.now += 30
        record(cells[0], fixed=10, evaluate=20, questions=100)
        bar.done(cells[0])
        assert bar.left() == "about 01:00 left"
        clock.now += 15
        assert bar.left() == "about 00:45 left"
        bar.done(cells[1], computed=False)
        bar.done(cells[2], computed=False)
        assert bar.left() == ""


def test_cells_side_by_side_take_less(tmp_path: Path, clock: Clock) -> None:
    cells = [make_cell(tmp_path, name, "rtn") for name in "abcdef"]
    with SweepProgress(cells) as bar:
        clock.now += 30  # in which two were computed
        for cell in cells[:2]:
            record(cell, fixed=10, evaluate=20, questions=100)
            bar.done(cell)
        assert bar.left() == "about 01:00 left"


def test_each_method_takes_as_long_as_it_did_before(tmp_path: Path, clock: Clock) -> None:
    fast, slow, new = (make_cell(tmp_path, f"old-{m}", m) for m in ("rtn", "qvlm", "awq"))
    record(fast, fixed=0, evaluate=20, questions=100)
    record(slow, fixed=600, evaluate=20, questions=100, resumed=50)
    cells = [make_cell(tmp_path, m, m, limit=200) for m in ("rtn", "qvlm")]
    with SweepProgress(cells) as bar:  # 40 s, and 600 + 2 * 40 s, because half were resumed
        assert bar.left() == "about 12:00 left"
    with SweepProgress([new]) as bar:  # the mean of 20 s and 640 s
        assert bar.left() == "about 05:30 left"


def test_a_failed_cell_and_a_damaged_record_cost_no_estimate(tmp_path: Path, clock: Clock) -> None:
    cells = [make_cell(tmp_path, name, "rtn") for name in "ab"]
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "run.json").write_text('{"files": {}}')
    with SweepProgress(cells) as bar:
        bar.done(cells[0])  # it failed, and left nothing
        assert bar.left() == "the first cell will tell how long"
        bar.done(cells[0])  # again, which does not count
        bar.done(cells[1])
        assert bar.left() == ""


def test_the_cost_of_a_cell() -> None:
    run = {
        "stages": {"load": {"seconds": 1}, "prove": {"seconds": 2}, "evaluate": {"seconds": 8}},
        "questions_per_process": [3, 1],
    }
    cost = Cost.of(run)
    assert cost == Cost(fixed=3, question=2, questions=4)
    assert (cost.seconds(None), cost.seconds(10)) == (11, 23)


def test_it_shows_on_a_terminal_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (False, True):
        stderr = io.StringIO()
        monkeypatch.setattr(stderr, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr("sys.stderr", stderr)
        with SweepProgress([make_cell(tmp_path, "a", "rtn")]) as bar:
            bar.done(make_cell(tmp_path, "a", "rtn"))
        assert ("1/1 cells" in stderr.getvalue()) is terminal

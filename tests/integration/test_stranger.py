"""A stranger's method: the example of docs/extending.md, word by word, in a folder of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from qvlm.records.record import find_records
from qvlm.tables import table2

ROOT = Path(__file__).resolve().parents[2]


def blocks(kind: str) -> list[str]:
    """The page's code blocks of a language."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    return re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (code,), (config,) = blocks("python"), blocks("yaml")
    assert len(code.splitlines()) <= 40
    folder = tmp_path / "mine"
    (folder / "method").mkdir(parents=True)
    (folder / "own_output.py").write_text(code)
    (folder / "method" / "own_output.yaml").write_text(config)
    return folder


def run(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "run.py"), "--config-dir", "mine", *overrides]
    small = ["evaluation.limit=8", "calibration.samples=8", "tracking=off"]
    return subprocess.run(
        [*command, *small], cwd=folder.parent, capture_output=True, text=True, check=False
    )


def test_the_example_runs_and_reaches_the_table(mine: Path) -> None:
    done = run(mine, "-m", "method=own_output,rtn", "bits=w4a4")
    assert done.returncode == 0, done.stderr
    runs = mine.parent / "results" / "runs"
    records = {record.method: record for record in find_records(runs)}
    assert set(records) == {"Own output", "RTN"}
    # As many candidates as percentiles for every linear, and its bits are real.
    own = records["Own output"]
    assert own.run["report"]["candidates"] == 3 * len(own.layers)
    assert max(row["input_levels"] for row in own.layers) <= 16
    frame = table2.build(records.values())
    assert set(frame["method"]) == {"Own output", "RTN"}


def test_its_own_refusal_is_one_sentence(mine: Path) -> None:
    done = run(mine, "method=own_output", "method.percentiles=[2]")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "method.percentiles=[2]" in done.stderr
    assert not (mine.parent / "results").exists()

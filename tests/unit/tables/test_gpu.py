"""`qvlm.tables.gpu`: its page is a function of its CSV file, and its messages without a GPU."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from qvlm.tables.gpu.__main__ import main
from qvlm.tables.gpu.page import page

pytestmark = pytest.mark.slow

RESULTS = Path(__file__).parents[3] / "results"


def committed() -> pd.DataFrame:
    return pd.read_csv(RESULTS / "gpu.csv", dtype=str, keep_default_na=False)


def test_the_committed_page_is_what_the_committed_lines_give(tmp_path: Path) -> None:
    shutil.copy(RESULTS / "gpu.csv", tmp_path)
    assert main(["--page", "--out", str(tmp_path), "--command", "make gpu"]) == 0
    made = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert made == (RESULTS / "gpu.md").read_text(encoding="utf-8")


def test_goals_follow_the_lines() -> None:
    """The ratio of decoding is computed from the two tokens, and the goal is met from 3.0 on."""
    lines = committed()
    w4a4 = (lines["model"] == "llava_13b") & (lines["form"] == "W4A4 clusters")
    token = w4a4 & (lines["batch"] == "1") & (lines["measure"] == "token")
    full = lines[(lines["form"] == "bf16") & (lines["measure"] == "token")].iloc[0]
    for factor, result in ((2.99, "missed"), (3.01, "met")):
        lines.loc[token, "value"] = str(float(full["value"]) / factor)
        found = re.search(r"\| decoding: times as fast as bf16 .*\|", page(lines, "make gpu"))
        assert found is not None and f"{factor}" in found[0] and result in found[0]


def test_the_page_says_which_lines_come_from_which_revision() -> None:
    lines = committed()
    lines["versions"] = "torch 2"
    text = page(lines, "x")
    assert "- All lines: torch 2. These lines do not record the revision of qvlm." in text
    assert "different revisions" not in text
    old = (lines["form"] == "bf16") & (lines["model"] == "llava_13b")
    lines["versions"] = "torch 2; qvlm 4567def"
    lines.loc[old, "versions"] = "torch 2; qvlm 0123abc"
    text = page(lines, "x")
    assert f"- {old.sum()} lines of gpu.csv: torch 2; qvlm 0123abc. They hold" in text
    assert f"- {(~old).sum()} lines of gpu.csv: torch 2; qvlm 4567def. They hold" in text
    goals = text[text.index("### Goals") : text.index("### Limits")]
    assert "different revisions: bf16 with qvlm 0123abc; W4A4 clusters with qvlm 4567def" in goals
    assert text.count("different revisions") == 1 + 3  # and each table of llava_13b


def test_a_page_without_lines_says_that_no_gpu_was_measured() -> None:
    assert "No GPU was measured." in page(committed()[:0], "make gpu")


def test_without_a_gpu_or_an_interpreter_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["--out", str(tmp_path)]) == 2
    assert "No GPU is at hand" in capsys.readouterr().err
    assert main(["--dry-run", "--out", str(tmp_path)]) == 2
    assert "Set TRITON_INTERPRET=1" in capsys.readouterr().err
    assert main(["--page", "--out", str(tmp_path)]) == 2
    assert "does not exist" in capsys.readouterr().err

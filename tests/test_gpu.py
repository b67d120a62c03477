"""Products and decoder for a GPU under Triton's interpreter, and a dry run of `make gpu`.

The interpreter must be on before Triton is imported, so all of it runs in processes of its own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def interpreted(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@needs_triton
@pytest.mark.parametrize("checks", ["triton_chunks.py", "triton_decoder.py"])
def test_checks_pass_under_the_interpreter(checks: str) -> None:
    path = str(Path(__file__).with_name(checks))
    done = interpreted("-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@needs_triton
def test_a_dry_run_measures_everything_once(tmp_path: Path) -> None:
    command = (str(ROOT / "experiments" / "gpu.py"), "--dry-run", "--out", str(tmp_path))
    done = interpreted(*command)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    file = tmp_path / "gpu.csv"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    frame = pd.read_csv(file, dtype=str, keep_default_na=False)
    expected = {
        "limits",
        "correctness",
        "tile",
        "model",
        "overlap",
        "vision",
        "miniature",
        "method",
    }
    assert set(frame["section"]) == expected
    assert not frame[["section", "model", "form", "batch", "setting", "measure"]].duplicated().any()
    within = frame[frame["measure"] == "within the bound"]
    assert len(within) == 7 and set(within["value"]) == {"yes"}
    same = frame[frame["measure"] == "same answers"]
    assert len(same) == 2 and set(same["value"]) == {"2"}
    # Stopped after a few lines, it goes on with those that are missing.
    kept = [line for line in lines if not line.startswith("miniature,")]
    file.write_text("".join(kept), encoding="utf-8")
    done = interpreted(*command)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    again = pd.read_csv(file, dtype=str, keep_default_na=False)
    assert set(again["section"]) == expected and len(again) == len(frame)
    assert file.read_text(encoding="utf-8").startswith("".join(kept))
    assert "### Methods" in (tmp_path / "gpu.md").read_text(encoding="utf-8")


def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "gpu.py")],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "no GPU is at hand" in done.stderr

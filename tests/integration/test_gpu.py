"""A dry run of `make gpu` on a CPU, under Triton's interpreter."""

import csv
from pathlib import Path

from tests.helpers.interpreter import interpreted, needs_triton

SECTIONS = {
    *("limits", "correctness", "tile", "model", "overlap", "vision", "miniature", "method"),
}


def read(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


@needs_triton
def test_a_dry_run_measures_everything_once(tmp_path: Path) -> None:
    command = ("-m", "qvlm.tables.gpu", "--dry-run", "--minutes", "60", "--out", str(tmp_path))
    done = interpreted(*command)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    file = tmp_path / "gpu.csv"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = read(file)
    assert {row["section"] for row in rows} == SECTIONS
    keys = [
        tuple(row[name] for name in ("section", "model", "form", "batch", "setting", "measure"))
        for row in rows
    ]
    assert len(set(keys)) == len(keys)
    within = [row["value"] for row in rows if row["measure"] == "within the bound"]
    assert within == ["yes"] * 7
    assert [row["value"] for row in rows if row["measure"] == "same answers"] == ["2", "2"]
    # Stopped after a few lines, it goes on with those that are missing.
    kept = [line for line in lines if not line.startswith("miniature,")]
    file.write_text("".join(kept), encoding="utf-8")
    done = interpreted(*command)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert len(read(file)) == len(rows) and {row["section"] for row in read(file)} == SECTIONS
    assert file.read_text(encoding="utf-8").startswith("".join(kept))
    assert "### Methods" in (tmp_path / "gpu.md").read_text(encoding="utf-8")

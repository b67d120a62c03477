"""The command of a table writes both files or none, and says what is wrong in one line."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from qvlm.errors import RunError, UserError
from qvlm.records.record import find_records
from qvlm.tables import table2
from qvlm.tables.table2 import build, main, write
from tests.helpers.records import make_record


def test_the_command_prints_the_page_and_writes_both(
    runs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_record(runs, bits="FP")
    make_record(runs, "AWQ", layers=[])
    out = runs.parent / "new" / "out"
    assert main(["--runs", str(runs), "--out", str(out), "--command", "make table2"]) == 0
    assert sorted(file.name for file in out.iterdir()) == ["table2.csv", "table2.md"]
    printed = capfd.readouterr()
    assert printed.out == (out / "table2.md").read_text()
    assert "make table2" in printed.out
    note, warning = printed.err.splitlines()
    assert note.startswith("note: table2 is not kept for make verify: mini_llava-fp-fp-")
    assert warning.startswith("warning: refused mini_llava-awq-w4a4")
    frame = pd.read_csv(out / "table2.csv")
    pd.testing.assert_frame_equal(frame, build(find_records(runs)), check_dtype=False)
    assert main(["--runs", str(runs), "--out", str(out)]) == 0
    assert f"`python -m qvlm.tables.table2 --runs {runs} --out {out}`" in capfd.readouterr().out


def test_committed_answers_alone_make_a_page(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_record(runs, bits="FP", generated=True)
    make_record(runs, generated=True)
    words = ["--out", str(runs.parent / "out"), "--command", "make table2"]
    assert main(["--runs", str(runs), *words]) == 0
    first = capfd.readouterr().out
    assert main(["--runs", str(runs.parent / "none"), "--add", *words]) == 0
    assert capfd.readouterr() == (first, "")
    offline = ["--tracking", "offline"]
    assert main(["--runs", str(runs.parent / "none"), "--add", *words, *offline]) == 0
    assert "table2 is not tracked" in capfd.readouterr().err


@pytest.mark.parametrize("exists", [True, False])
def test_no_records_are_the_users_error(
    runs: Path, exists: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    if exists:
        runs.mkdir()
    out = runs.parent / "out"
    assert main(["--runs", str(runs), "--out", str(out)]) == 2
    out_text, err = capfd.readouterr()
    assert out_text == ""
    assert err.count("\n") == 1
    assert str(runs) in err
    assert "--runs" in err
    assert not out.exists()


def test_a_damaged_record_stops_the_table(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = make_record(runs).path
    (path / "metrics.json").write_text("{}")
    assert main(["--runs", str(runs), "--out", str(runs.parent / "out")]) == 1
    err = capfd.readouterr().err
    assert err.startswith("error: ")
    assert str(path) in err
    with pytest.raises(RunError):
        find_records(runs)


def test_an_unwritable_folder_keeps_the_old_table(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_record(runs)
    out = runs.parent / "out"
    write(find_records(runs), out, "before")
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(table2.Path, "replace", fail)
    with pytest.raises(UserError, match=r"--out: .* \(No space left on device\)"):
        write(find_records(runs), out, "after")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    (runs.parent / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        write(find_records(runs), runs.parent / "file", "make table2")

"""Records are whole or absent, notice damage, and are named by what their numbers depend on."""

import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from qvlm.errors import RunError, UserError
from qvlm.records import environment
from qvlm.records.files import temporary_name
from qvlm.records.record import (
    ABANDONED_SECONDS,
    FORGOTTEN_SECONDS,
    Record,
    answers_folder,
    find_record,
    find_records,
    identify,
    plain,
    remove_leftovers,
    require_writable,
)
from tests.helpers.records import FILES, PREDICTIONS, RUN, write

pytestmark = pytest.mark.slow


def test_a_record_reads_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "mini-rtn-w4a4-abc"
    record = write(path)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    assert os.listdir(path.parent) == [path.name]
    assert (record.model, record.method, record.bits, record.name) == (
        *("mini", "RTN", "W4A4"),
        path.name,
    )
    assert record.config == {"seed": 0, "results_dir": "results"}
    assert record.metrics["classes"]["Avg"] == {"n": 2, "accuracy": 50.0}
    assert record.layers[0]["weight_levels"] == 16
    pd.testing.assert_frame_equal(record.predictions, PREDICTIONS)
    assert [found.path for found in find_records(path.parent)] == [path]


def test_a_record_replaces_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "cell"
    write(path, accuracy=1.0)
    (path / "stray.txt").write_text("from before")
    assert write(path, accuracy=2.0).metrics["classes"]["Avg"]["accuracy"] == 2.0
    assert os.listdir(tmp_path) == ["cell"]
    assert sorted(os.listdir(path)) == sorted(FILES)


@pytest.mark.parametrize("moment", range(12))
def test_a_failure_at_any_moment_leaves_no_half_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Every call that touches the disk is failed in turn; then nothing, or the old, is there."""
    path = tmp_path / "cell"
    write(path, accuracy=1.0)
    calls = 0
    open_, rename, fsync = os.open, Path.rename, os.fsync

    def failing(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > moment:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "fsync", failing(fsync))
    monkeypatch.setattr(Path, "rename", failing(rename))
    finished = False
    try:
        write(path, accuracy=2.0)
        finished = True
    except KeyboardInterrupt:
        monkeypatch.undo()
    records = find_records(tmp_path)
    assert os.open is open_
    assert all(record.metrics["classes"]["Avg"]["accuracy"] in (1.0, 2.0) for record in records)
    assert not finished or records[0].metrics["classes"]["Avg"]["accuracy"] == 2.0
    assert len(records) == 1
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_killed_writer_leaves_nothing_that_is_taken_for_a_record(tmp_path: Path) -> None:
    """SIGKILL between the files and the rename: no handler runs, a hidden folder stays."""
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from pathlib import Path
from tests.helpers import records
Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
records.write(Path({str(tmp_path)!r}) / "cell")
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert sorted(file.name for file in leftover.iterdir()) == sorted(FILES)
    assert find_records(tmp_path) == []

    remove_leftovers(tmp_path)  # it may be another run that is just writing
    write(tmp_path / "ell")
    assert leftover.exists()
    write(tmp_path / "cell")  # no other run writes this record
    assert sorted(os.listdir(tmp_path)) == ["cell", "ell"]


def test_leftovers_of_other_cells_are_removed_once_they_are_old(tmp_path: Path) -> None:
    leftover = temporary_name(tmp_path / "other")
    leftover.mkdir()
    write(tmp_path / "cell")
    assert leftover.exists()
    old = time.time() - ABANDONED_SECONDS - 1
    os.utime(leftover, (old, old))
    write(tmp_path / "cell")
    assert os.listdir(tmp_path) == ["cell"]


def test_answers_of_a_killed_cell_wait_for_it_a_month(tmp_path: Path) -> None:
    path = tmp_path / "cell"
    answers = answers_folder(path, "abc", {"device": "cpu"})
    assert answers != answers_folder(path, "abd", {"device": "cpu"})
    assert answers != answers_folder(path, "abc", {"device": "cuda"})
    answers.mkdir()
    old = time.time() - ABANDONED_SECONDS - 1
    os.utime(answers, (old, old))
    write(path)
    assert answers.exists()
    assert [record.name for record in find_records(tmp_path)] == ["cell"]
    os.utime(answers, (old - FORGOTTEN_SECONDS, old - FORGOTTEN_SECONDS))
    write(path)
    assert os.listdir(tmp_path) == ["cell"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "flipped"])
def test_damage_is_noticed(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / "cell"
    write(path)
    file = path / name
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    for read in (lambda: Record.load(path), lambda: find_records(tmp_path)):
        with pytest.raises(RunError) as refusal:
            read()
        assert str(path) in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_other_things_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "cell")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".hidden").mkdir()
    remove_leftovers(tmp_path)
    assert len(find_records(tmp_path)) == 1
    assert len(list(tmp_path.iterdir())) == 3
    assert find_records(tmp_path / "nowhere") == []


def test_values_become_plain() -> None:
    value = {
        "nan": float("nan"),
        "inf": np.float32("inf"),
        "array": np.arange(2),
        "flag": np.bool_(True),
        "set": {2, 1},
        3: (1, None),
    }
    result = plain(value)
    assert result == {
        "nan": None,
        "inf": None,
        "array": [0, 1],
        "flag": True,
        "set": [1, 2],
        "3": [1, None],
    }
    json.dumps(result, allow_nan=False)
    with pytest.raises(TypeError, match="object"):
        plain({"a": object()})


def rewrite(path: Path, **parts: Any) -> None:
    """Writes parts of a record anew, with checksums that are right: this is no damage."""
    for name, value in parts.items():
        file = next(path.glob(f"{name}.*"))
        file.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    run = parts.get("run", RUN)
    if isinstance(run, dict) and "files" not in parts.get("run", {}):
        names = [name for name in FILES if name != "run.json"]
        sums = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}
        (path / "run.json").write_text(json.dumps({**run, "files": sums}))


LACKING = [{key: value for key, value in RUN.items() if key != gone} for gone in RUN]
GARBLED: list[dict[str, Any]] = [
    *({"run": value} for value in ([], 5, None, {}, {"files": []}, {**RUN, "files": {}}, *LACKING)),
    *({"run": {**RUN, key: 5}} for key in RUN),
    *({"run": {**RUN, "report": value}} for value in ([], {}, None)),
    *({"run": {**RUN, "influences": {"bits": value}}} for value in (None, 5, [], {"weights": "4"})),
    {"run": {**RUN, "influences": {"bits": {"weights": 4, "activations": 4, "more": 1}}}},
    {"run": {**RUN, "files": {"../../etc/passwd": "0"}}},
    {"run": b"[" * 100_000},
    {"run": b"\xff\xfe"},
    *({"metrics": value} for value in ([], 5, None, {}, {"classes": []}, {"classes": {"Avg": 5}})),
    {"metrics": b"[" * 100_000},
    *({"config": value} for value in ([], 5, b"{", b"\xff", b"!!python/object:os.system {}", b"")),
    *({"bits": value} for value in ({}, 5, None, [5], b"")),
    *({"predictions": value} for value in (b"", b"PAR1", b"PAR1" * 9, 5)),
]


@pytest.mark.parametrize("parts", GARBLED, ids=lambda parts: repr(parts)[:60])
def test_a_garbled_record_is_one_sentence(tmp_path: Path, parts: dict[str, Any]) -> None:
    path = tmp_path / "cell"
    write(path)
    rewrite(path, **parts)
    with pytest.raises(RunError) as refusal:
        find_records(tmp_path)
    sentence = str(refusal.value)
    assert sentence.startswith(str(path)) and sentence.endswith("and run the cell again")
    assert "\n" not in sentence
    record, why = find_record(path, "abc")
    assert record is None and why == sentence


def test_predictions_without_a_column_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "cell"
    write(path)
    for column in PREDICTIONS:
        buffer = io.BytesIO()
        PREDICTIONS.drop(columns=column).to_parquet(buffer)
        rewrite(path, predictions=buffer.getvalue())
        with pytest.raises(RunError, match=f"has no column {column}"):
            Record.load(path)
    rewrite(
        path, predictions=(buffer := io.BytesIO(), PREDICTIONS.to_parquet(buffer))[0].getvalue()
    )
    Record.load(path)


def test_a_full_disk_leaves_the_record_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "cell"
    write(path, accuracy=1.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for limit in (0, 100, 1000):  # not even the first file fits, nor the second, ...
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            with pytest.raises(
                RunError, match=r"^record .+cell cannot be written \(.*File too large\)$"
            ):
                write(path, accuracy=2.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert Record.load(path).metrics["classes"]["Avg"]["accuracy"] == 1.0
    assert os.listdir(tmp_path) == ["cell"]
    write(path, accuracy=2.0)


PLACES = ["/proc/nowhere/runs", "file/runs", "file", "nothing", "nothing/runs", "loop", "loop/runs"]
PLACES += ["x" * 300, "x" * 300 + "/runs", "a/" * 2100, "nul\0", "under/nothing/runs"]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[:20])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "nothing").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "under").mkdir()
    (tmp_path / "under" / "nothing").symlink_to("gone")
    with pytest.raises(UserError, match="^results_dir: ") as refusal:
        require_writable(tmp_path / place)
    assert "\n" not in str(refusal.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "loop", "nothing", "under"]


def test_a_link_to_a_folder_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    require_writable(tmp_path / "link" / "results" / "runs")
    assert os.listdir(tmp_path / "real") == []


def test_a_folder_that_can_be_made_is_accepted_and_not_made(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == []


def test_the_identity_does_not_depend_on_order() -> None:
    assert identify({"a": 1, "b": {"c": 2, "d": 3}}, "x", {}) == identify(
        {"b": {"d": 3, "c": 2}, "a": 1}, "x", {}
    )


def test_changes_are_looked_for_in_the_whole_checkout() -> None:
    assert (environment.ROOT / "conf" / "config.yaml").is_file()
    assert (environment.ROOT / "qvlm").is_dir()


def test_the_surroundings_name_versions_and_not_the_machine() -> None:
    import platform

    found = environment.surroundings()
    assert found["versions"]["torch"]
    assert set(found["git"]) == {"revision", "dirty"}
    assert found["hardware"]["cores"] >= 1
    node = platform.node()
    assert len(node) < 4 or node not in json.dumps(found["hardware"])

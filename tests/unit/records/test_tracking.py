"""What W&B is given is read back from its own files; what goes wrong there costs a warning."""

import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import wandb
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record as Entry

from qvlm.config.schema import TrackingConfig
from qvlm.records.record import Record
from qvlm.records.tracked import example_rows
from qvlm.records.tracking import Tracker, log_table
from qvlm.tables.table2 import main
from tests.helpers.records import make_questions, make_record

pytestmark = pytest.mark.slow

COUNT = 60


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No account, no settings, an empty home folder."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    return home


def entries(path: Path) -> Iterator[Entry]:
    """The records of a .wandb file: a LevelDB log of 32 KiB blocks behind a header of 7 bytes."""
    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = 2**15 - at % 2**15
        if room < 7:  # the rest of a block is too small for a header
            at += room
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, last
            yield Entry.FromString(part)
            part = b""


class Run:
    """An offline run, from disk."""

    def __init__(self, folder: Path) -> None:
        (file,) = folder.glob("*.wandb")
        self.summary: dict[str, Any] = {}
        self.tables: dict[str, Any] = {}
        self.artifacts: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        read = list(entries(file))
        assert read[-1].WhichOneof("record_type") == "exit"  # nothing is still being written
        self.exit_code = read[-1].exit.exit_code
        for entry in read:
            kind = entry.WhichOneof("record_type")
            if kind == "run":
                self.about = entry.run
                self.config = {u.key: json.loads(u.value_json) for u in entry.run.config.update}
            elif kind == "config":
                for update in entry.config.update:
                    key = update.key or ".".join(update.nested_key)
                    self.config[key] = json.loads(update.value_json)
            elif kind == "history":
                self.history.append(
                    {
                        item.key or ".".join(item.nested_key): json.loads(item.value_json)
                        for item in entry.history.item
                    }
                )
            elif kind == "summary":
                for update in entry.summary.update:
                    key = update.key or ".".join(update.nested_key)
                    self.summary[key] = json.loads(update.value_json)
            elif kind == "artifact":
                artifact = entry.artifact
                if artifact.type == "run_table":  # run-<id>-<key>
                    self.tables[artifact.name.split("-")[-1]] = artifact
                else:
                    self.artifacts[artifact.name] = artifact

    def table(self, name: str) -> pd.DataFrame:
        (content,) = (
            Path(c.local_path) for c in self.tables[name].manifest.contents if ".table" in c.path
        )
        table = json.loads(content.read_text())
        return pd.DataFrame(table["data"], columns=table["columns"])


def runs_in(folder: Path) -> list[Run]:
    return [Run(path) for path in sorted(folder.glob("offline-run-*"))]


def track(record: Record, problems: Any, tracking: TrackingConfig, group: str) -> None:
    """Logs a record as the pipeline does."""
    tags = [record.model, record.method, record.bits]
    command = record.run["command"]
    with Tracker(tracking, group, record.name, tags, command, record.config) as tracker:
        tracker.finish(record, problems)


def test_nothing_is_printed_where_wandb_was_set_up_before(
    tmp_path: Path, bare: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wandb.setup(wandb.Settings(mode="offline"))
    record = make_record(tmp_path / "runs", "AWQ", n=COUNT)
    tracking = TrackingConfig(dir=str(tmp_path / "wandb"), examples=8)
    capfd.readouterr()
    track(record, make_questions(record), tracking, "table2")
    assert capfd.readouterr() == ("", "")
    assert len(runs_in(tmp_path / "wandb")) == 1


def test_a_cell_is_read_back_from_disk(
    tmp_path: Path, bare: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = make_record(tmp_path / "runs", "AWQ", n=COUNT)
    folder = tmp_path / "results" / "wandb"
    tracking = TrackingConfig(dir=str(folder), examples=8)
    environment = dict(os.environ)
    track(record, make_questions(record), tracking, "table2")
    assert capfd.readouterr() == ("", "")
    kept = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    assert kept == environment
    (run,) = runs_in(folder)

    assert run.about.display_name == record.name
    assert run.about.project == "qvlm"
    assert run.about.run_group == "table2"
    assert set(run.about.tags) == {"mini_llava", "AWQ", "W4A4"}
    assert run.about.host == ""
    assert run.config["quantizer"] == record.config["quantizer"]
    assert run.config["run"]["hardware"]["cpu"] == "Some CPU"
    assert run.config["run"]["git"]["revision"] == "0123456789abcdef"

    for name, row in record.metrics["classes"].items():
        for key, value in row.items():
            assert run.summary[f"{key}/{name}"] == pytest.approx(value)
    assert run.summary["seconds/evaluate"] == 1.5
    assert run.summary["peak_mib/quantize"] == 700
    assert run.summary["search/seconds"] == 2.0
    assert run.summary["search/candidates"] == 7
    assert run.summary["bits/layers"] == len(record.layers)
    assert run.summary["bits/most_weight_levels"] == 16
    assert run.summary["bits/most_input_levels"] == 15
    assert run.summary["bits/exceeding"] == 0

    assert run.about.notes == record.run["command"]
    artifact = run.artifacts[record.name]
    assert artifact.type == "record"
    files = {content.path: Path(content.local_path) for content in artifact.manifest.contents}
    assert {name: file.read_bytes() for name, file in files.items()} == {
        file.name: file.read_bytes() for file in record.path.iterdir()
    }

    drawn = run.table("accuracy_by_class_table").set_index("class")["accuracy"]
    assert drawn["NAT"] == record.metrics["classes"]["NAT"]["accuracy"]
    stages = run.table("seconds_by_stage_table").set_index("stage")["seconds"]
    assert dict(stages) == {"load": 1.5, "quantize": 1.5, "evaluate": 1.5}
    for chart in ("accuracy_by_class", "seconds_by_stage"):
        assert run.config[f"_wandb.visualize.{chart}"]["panel_type"] == "Vega2"

    classes = run.table("classes").set_index("class")
    assert list(classes.index) == list(record.metrics["classes"])
    assert classes.loc["Avg", "accuracy"] == record.metrics["classes"]["Avg"]["accuracy"]

    examples = run.table("examples")
    predictions = record.predictions.set_index("question_id")
    images = {c.path: c.local_path for c in run.tables["examples"].manifest.contents}
    assert len(examples) == 8
    assert examples["image"].notna().sum() == 4
    for _, row in examples.iterrows():
        said = predictions.loc[row["question_id"]]
        number = int(row["question_id"].removeprefix("test-"))
        assert row["question"].endswith(f"Question {number}?")
        assert row["question"].startswith("Look.") == bool(number % 2)
        assert row["choices"] == "(A) red (B) green (C) blue"
        assert row["answer"] == "ABC"[said["answer"]]
        expected = None if pd.isna(said["prediction"]) else "ABC"[said["prediction"]]
        assert row["prediction"] == expected
        assert row["correct"] == said["correct"]
        assert row["text"] == said["text"]
        assert (row["image"] is not None) == said["has_image"]
        if row["image"] is not None:
            path = images[row["image"]["path"]]
            assert Path(path).is_relative_to(folder)
            assert Image.open(path).getpixel((0, 0))[:3] == (number, 0, 0)
    assert [path for path in bare.rglob("*") if path.is_file()] == []


def test_full_precision_has_no_bits(tmp_path: Path) -> None:
    record = make_record(tmp_path / "runs", bits="FP", n=3)
    tracking = TrackingConfig(dir=str(tmp_path / "elsewhere"), examples=0)
    track(record, make_questions(record), tracking, "cells")
    (run,) = runs_in(tmp_path / "elsewhere" / "wandb")
    assert not any(key.startswith("bits/") for key in run.summary)
    assert set(run.tables) == {"classes", "accuracy_by_class_table", "seconds_by_stage_table"}
    classes = run.table("classes").set_index("class")
    empty = [name for name, row in record.metrics["classes"].items() if not row["n"]]
    assert empty
    assert all(pd.isna(classes.loc[name, "accuracy"]) for name in empty)
    assert not any(key.endswith(f"accuracy/{empty[0]}") for key in run.summary)


def test_the_sweep_ends_with_its_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    record = make_record(tmp_path / "runs", generated=True)
    command = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path), "--tracking"]
    assert main([*command, "off"]) == 0
    folder = Path(record.config["tracking"]["dir"])
    assert not folder.exists()
    assert main([*command, "offline"]) == 0
    assert capfd.readouterr().err == ""
    (run,) = runs_in(folder)
    assert run.about.run_group == "table2"
    assert run.about.job_type == "table"
    logged = run.artifacts["table2"]
    files = {content.path: Path(content.local_path) for content in logged.manifest.contents}
    assert sorted(files) == ["table2.csv", "table2.md"]
    for name, file in files.items():
        assert file.read_bytes() == (tmp_path / name).read_bytes()
    frame = pd.read_csv(tmp_path / "table2.csv")
    long = run.table("table2")
    assert list(long.columns) == list(frame.columns)
    assert long["accuracy"].tolist() == frame["accuracy"].tolist()
    assert [value for value in long["paper_accuracy"] if value is not None] == []
    compared = run.table("accuracy_by_cell_table")
    assert compared["cell"].tolist() == ["mini_llava RTN W4A4"]
    assert compared["accuracy"].tolist() == [record.metrics["classes"]["Avg"]["accuracy"]]


def test_memory_is_drawn_against_accuracy_where_it_is_known(tmp_path: Path) -> None:
    records = [make_record(tmp_path / "runs", method, n=30) for method in ("RTN", "AWQ")]
    records[1].run["weight_bytes"] = 3 * 2**20
    for name in ("t.csv", "t.md"):
        (tmp_path / name).write_text("a,b\n1,2\n")
    tracking = TrackingConfig(dir=str(tmp_path / "wandb"))
    log_table(tmp_path / "t.csv", tmp_path / "t.md", tracking, "g", records)
    (run,) = runs_in(tmp_path / "wandb")
    drawn = run.table("accuracy_against_memory_table")
    assert drawn["weights_mib"].tolist() == [3.0]
    assert drawn["accuracy"].tolist() == [records[1].metrics["classes"]["Avg"]["accuracy"]]
    assert run.config["_wandb.visualize.accuracy_against_memory"]["panel_type"] == "Vega2"


def test_a_run_is_watched_from_its_first_answers(tmp_path: Path) -> None:
    record = make_record(tmp_path / "runs", n=30)
    tracking = TrackingConfig(dir=str(tmp_path / "wandb"), examples=0)
    with Tracker(tracking, "g", record.name, command="qvlm method=rtn") as tracker:
        for answered in range(1, 1001):
            tracker.progress(answered, 1000, answered / 10, 10.0, 90.0)
        assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
        tracker.finish(record, make_questions(record))
    (run,) = runs_in(tmp_path / "wandb")
    steps = [entry for entry in run.history if "progress/answered" in entry]
    answered = [entry["progress/answered"] for entry in steps]
    assert 20 <= len(steps) <= 51
    assert answered == sorted(answered)
    assert (answered[0], answered[-1]) == (1, 1000)
    assert [entry["progress/accuracy"] for entry in steps] == [n / 10 for n in answered]
    assert {entry["progress/ci_high"] for entry in steps} == {90.0}
    assert run.about.notes == "qvlm method=rtn"
    assert run.summary["n/Avg"] == 30
    assert run.exit_code == 0


def test_a_cell_that_fails_is_marked_as_failed(tmp_path: Path) -> None:
    tracking = TrackingConfig(dir=str(tmp_path / "wandb"))
    with pytest.raises(RuntimeError), Tracker(tracking, "g", "name") as tracker:
        tracker.progress(1, 10, 100.0, 20.0, 100.0)
        raise RuntimeError("the model is gone")
    (run,) = runs_in(tmp_path / "wandb")
    assert run.exit_code == 1
    with pytest.raises(RuntimeError), Tracker(tracking, "g", "name"):
        raise RuntimeError("before the first answer, there is no run yet")
    assert len(runs_in(tmp_path / "wandb")) == 1


def test_a_failure_on_the_way_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import wandb

    record = make_record(tmp_path / "runs", n=3)

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("disk full")

    with Tracker(TrackingConfig(dir=str(tmp_path / "wandb")), "g", record.name) as tracker:
        tracker.progress(1, 10, 100.0, 20.0, 100.0)
        monkeypatch.setattr(wandb.Run, "log", broken)
        for answered in range(2, 10):
            tracker.progress(answered, 10, 100.0, 20.0, 100.0)
        tracker.finish(record, make_questions(record))
    err = capfd.readouterr().err
    assert err == (f"warning: Weights & Biases did not log {record.name} (ValueError: disk full)\n")


@pytest.mark.parametrize("gone", ["package", "service"])
def test_a_broken_installation_costs_no_cell(
    gone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    teardown = wandb.teardown

    def broken(*given: Any) -> None:
        teardown(*given)
        raise RuntimeError("the service is gone")

    if gone == "package":
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        monkeypatch.setattr(wandb, "teardown", broken)
    record = make_record(tmp_path / "runs", n=3)
    with Tracker(TrackingConfig(dir=str(tmp_path / "wandb")), "g", record.name) as tracker:
        tracker.progress(1, 10, 100.0, 20.0, 100.0)
        tracker.finish(record, make_questions(record))
    err = capfd.readouterr().err
    assert err.startswith(f"warning: Weights & Biases did not log {record.name} (")
    assert err.count("\n") == 1
    assert "WANDB_DATA_DIR" not in os.environ


def test_off_never_imports_wandb(tmp_path: Path) -> None:
    record = make_record(tmp_path / "runs", n=3)
    script = """
import sys
from pathlib import Path
from qvlm.config.schema import TrackingConfig
from qvlm.records.record import Record
from qvlm.records.tracking import Tracker, log_table
tracking = TrackingConfig(mode="off", dir=sys.argv[2])
with Tracker(tracking, "g", "name") as tracker:
    tracker.progress(1, 2, 100.0, 20.0, 100.0)
    tracker.finish(Record.load(sys.argv[1]), [])
log_table(Path("t.csv"), Path("t.md"), tracking, "g")
sys.exit(any(name.partition(".")[0] == "wandb" for name in sys.modules))
"""
    arguments = [sys.executable, "-c", script, str(record.path), str(tmp_path / "w")]
    done = subprocess.run(arguments, check=False)
    assert done.returncode == 0
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("named", ["wandb", "elsewhere"])
def test_online_without_a_key_becomes_offline(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], named: str
) -> None:
    record = make_record(tmp_path / "runs", n=COUNT)
    written = {file.name: file.read_bytes() for file in record.path.iterdir()}
    tracking = TrackingConfig(mode="online", dir=str(tmp_path / named), examples=2)
    track(record, make_questions(record), tracking, "g")
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("warning: tracking=online is not possible (")
    assert "API key" in err
    assert err.count("\n") == 1
    pattern = err.strip().partition("wandb sync ")[2]  # the command finds the run
    (run,) = runs_in(Path(pattern).parent)
    assert run.summary["n/Avg"] == COUNT
    assert {file.name: file.read_bytes() for file in record.path.iterdir()} == written


@pytest.mark.parametrize(
    "mode", ["CMYK", "F", "I", "I;16", "1", "LA", "P", "RGBA", "LAB", "damaged"]
)
def test_an_odd_image_costs_nothing_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], mode: str
) -> None:
    record = make_record(tmp_path / "runs", "AWQ", n=COUNT)
    problems = list(make_questions(record))
    odd = Image.new("RGB" if mode == "damaged" else mode, (8, 8))
    if mode == "damaged":
        buffer = io.BytesIO()
        odd.save(buffer, "PNG")
        odd = Image.open(
            io.BytesIO(buffer.getvalue()[:45])
        )  # the header is read, the rest is not there
    row = record.predictions["has_image"].tolist().index(True)
    changed = [
        dict(problem, image=odd) if i == row else problem for i, problem in enumerate(problems)
    ]
    track(record, changed, TrackingConfig(dir=str(tmp_path / "wandb"), examples=COUNT), "g")  # type: ignore[arg-type]
    assert capfd.readouterr() == ("", "")
    (run,) = runs_in(tmp_path / "wandb")
    assert run.summary["n/Avg"] == COUNT
    examples = run.table("examples")
    shown = record.predictions["has_image"].sum() - (mode == "damaged")
    assert len(examples) == COUNT
    assert examples["image"].notna().sum() == shown


def test_a_failure_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    record = make_record(tmp_path / "runs", n=3)
    (tmp_path / "file").write_text("")
    track(record, make_questions(record), TrackingConfig(dir=str(tmp_path / "file")), "g")
    err = capfd.readouterr().err
    assert err.startswith(f"warning: Weights & Biases did not log {record.name} (")
    assert err.count("\n") == 1
    assert Record.load(record.path).metrics == record.metrics


def test_the_users_own_folders_are_left_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "mine"))
    (tmp_path / "t.csv").write_text("a,b\n1,\n")
    (tmp_path / "t.md").write_text("t")
    tracking = TrackingConfig(dir=str(tmp_path / "wandb"))
    log_table(tmp_path / "t.csv", tmp_path / "t.md", tracking, "g")
    assert os.environ["WANDB_DATA_DIR"] == str(tmp_path / "mine")
    assert any((tmp_path / "mine").rglob("*"))


@pytest.mark.parametrize(
    ("has_image", "count", "expected"),
    [
        ([True, False] * 8, 4, [0, 1, 8, 9]),
        ([False] * 8, 4, [0, 2, 4, 6]),
        ([True] * 8, 4, [0, 2, 4, 6]),
        ([True] + [False] * 6, 4, [0, 1, 3, 5]),
        ([True, False], 8, [0, 1]),
        ([], 8, []),
        ([True, False], 0, []),
    ],
)
def test_examples_are_spread(has_image: list[bool], count: int, expected: list[int]) -> None:
    assert example_rows(has_image, count) == expected

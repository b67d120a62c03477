"""Weights & Biases' own clients against a server on this machine: what the docs say works."""

import glob
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qvlm.config.schema import TrackingConfig
from qvlm.evaluation.metrics import CLASSES
from qvlm.records.record import Record
from qvlm.records.tracking import Tracker
from tests.helpers.records import make_questions, make_record
from tests.helpers.wandb_server import KEY, Server, serving

DOCS = Path(__file__).resolve().parents[2] / "docs" / "tracking.md"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The server, and an account there; the working folder is empty."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    with serving() as started:
        monkeypatch.setenv("WANDB_BASE_URL", started.url)
        yield started


def track(record: Record, tracking: TrackingConfig) -> None:
    with Tracker(tracking, "table2", record.name, ["AWQ"], "qvlm method=awq") as tracker:
        for answered in (10, 20, 30):
            tracker.progress(answered, 30, 50.0, 40.0, 60.0)
        tracker.finish(record, make_questions(record))


def check(server: Server, record: Record) -> None:
    """The server has the run, its history and its artifacts."""
    created = next(given for given in server.asked("UpsertBucket") if given["displayName"])
    assert created["displayName"] == record.name
    assert created["groupName"] == "table2"
    assert created["notes"] == "qvlm method=awq"
    assert created["project"] == "qvlm"
    artifacts = [given["input"]["artifactTypeName"] for given in server.asked("CreateArtifact")]
    assert "record" in artifacts
    lines: list[str] = []
    for sent in server.streamed:
        lines += sent.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
    history = [entry for entry in map(json.loads, lines) if "progress/answered" in entry]
    assert [entry["progress/answered"] for entry in history] == [10, 20, 30]
    assert [sent["exitcode"] for sent in server.streamed if sent.get("complete")] == [0]


def test_the_command_of_the_docs_uploads(server: Server, tmp_path: Path) -> None:
    record = make_record(tmp_path / "runs", "AWQ", n=30)
    folder = "results/wandb"  # `tracking.dir` of a run without options
    track(record, TrackingConfig(dir=folder))
    assert server.operations == []
    (line,) = [line for line in DOCS.read_text().splitlines() if "wandb sync results/wandb" in line]
    _, *words = shlex.split(line)
    expanded = [found for word in words for found in (glob.glob(word) or [word])]
    assert len(expanded) == 2
    done = subprocess.run(
        [sys.executable, "-m", "wandb", *expanded], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    check(server, record)


def test_an_online_run_is_uploaded_while_it_runs(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = make_record(tmp_path / "runs", "AWQ", n=30)
    track(record, TrackingConfig(mode="online", dir=str(tmp_path / "wandb")))
    assert capfd.readouterr().err == ""
    check(server, record)


def test_a_workspace_and_a_report_are_made(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed")
    from qvlm.report.workspace import main

    assert main(["--project", "qvlm"]) == 0
    addresses = capsys.readouterr().out.split()
    assert [address.startswith(f"{server.url}/someone/qvlm") for address in addresses] == [True] * 2
    views: list[dict[str, Any]] = server.asked("upsertView")
    assert [view["type"] for view in views] == ["project-view", "runs"]
    for view in views:
        assert (view["entityName"], view["projectName"]) == ("someone", "qvlm")
        spec = view["spec"]
        for name in CLASSES:
            assert f"accuracy/{name}" in spec
        for key in ("progress/ci_low", "weights/mib", "seconds/evaluate", "bits/exceeding"):
            assert key in spec
        assert "examples" in spec


def test_a_server_that_refuses_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed")
    import wandb

    from qvlm.report import workspace

    def refuse() -> None:
        raise ValueError("no API key\nsecond line")

    monkeypatch.setattr(wandb, "Api", refuse)
    assert workspace.main([]) == 1
    assert capsys.readouterr().err == "error: Weights & Biases refused: no API key\n"


def test_a_missing_package_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qvlm.report import workspace

    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert workspace.main([]) == 2
    assert capsys.readouterr().err == (
        "error: wandb-workspaces is not installed. Give `pip install wandb-workspaces`.\n"
    )

"""`qvlm prove` on checkpoints that a cell saved: weights, and what enters each product."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from qvlm.proving.command import main
from tests.helpers.cells import run
from tests.helpers.foreign import edit

pytestmark = [pytest.mark.usefixtures("tracked"), pytest.mark.instruction_set]


@pytest.fixture
def folder(cell: Any, tmp_path: Path) -> Path:
    packed = tmp_path / "packed"
    run(cell("bits=w4a8", f"save_packed={packed}", "evaluate=false"))
    return packed


def test_a_saved_model_is_proven_in_weights_and_inputs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"].startswith(f"proven in its weights and inputs: {len(found['layers'])}")
    assert {row["layer"] for row in found["inputs"]} == {row["layer"] for row in found["layers"]}
    assert all(0 < row["input_levels"] <= 256 for row in found["inputs"])
    assert main([str(folder)]) == 0
    assert "| layer " in capsys.readouterr().out.partition("## What enters the products")[2]


def test_what_qvlm_json_makes_up_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    origin = json.loads((folder / "qvlm.json").read_text())
    origin["options"]["bits"] = {"weights": 4, "activations": 4}
    (folder / "qvlm.json").write_text(json.dumps(origin))
    assert main([str(folder)]) == 1
    said = capsys.readouterr().err
    assert "it is not a W4A4 model as its qvlm.json says: its activations have 8 bits" in said


def test_a_model_that_does_not_load_is_not_proven(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = load_file(folder / "model.safetensors")
    edit(folder, {"lm_head.weight": held["lm_head.weight"][:-1]})
    assert main([str(folder)]) == 1
    assert "checkpoint: it does not run here: " in capsys.readouterr().err

"""The whole line on a toy: real quantizer, walk and evaluation; only the data and W&B are fakes."""

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from qvlm.cell import inputs, material, pipeline
from qvlm.errors import RunError, UserError
from qvlm.evaluation.adapter import InMemoryModel
from qvlm.methods.base import MethodReport
from qvlm.quantization import Walk, expected_layers
from qvlm.records.record import Record, find_records
from qvlm.runtime.stages import Stages
from tests.helpers.cells import SPLITS, Tracked, run
from tests.helpers.configs import load
from tests.helpers.problems import make_model

pytestmark = [pytest.mark.usefixtures("tracked"), pytest.mark.instruction_set]

QUANTIZED_STAGES = [
    *("load", "calibrate", "reference", "quantize", "prove", "evaluate", "divergence")
]


def test_a_cell_becomes_a_record(cell: Any, tracked: Tracked, tmp_path: Path) -> None:
    config = cell("group=sweep")
    path = run(config)
    assert path.parent == tmp_path / "results" / "runs"
    assert re.fullmatch(r"toy-rtn-w4a4-[0-9a-f]{8}", path.name)
    record = Record.load(path)
    assert (record.model, record.method, record.bits) == ("toy", "RTN", "W4A4")
    assert record.run["hash"].startswith(path.name[-8:])

    assert list(record.run["stages"]) == QUANTIZED_STAGES
    assert all(cost["seconds"] >= 0 for cost in record.run["stages"].values())
    assert all(cost["peak_mib"] > 50 for cost in record.run["stages"].values())

    calibration = record.run["calibration"]
    assert len(set(calibration["ids"])) == 6
    assert set(calibration["ids"]) <= set(range(20))
    assert calibration["split"] == "train"

    loaded = make_model()
    assert [row["layer"] for row in record.layers] == expected_layers(loaded.model, True)
    assert record.run["exceeding"] == []
    assert max(row["weight_levels"] for row in record.layers) <= 16
    assert max(row["input_levels"] for row in record.layers) <= 16

    assert len(record.predictions) == record.metrics["classes"]["Avg"]["n"] == 12
    kl = record.metrics["kl"]
    assert kl["mean"] > 1e-4  # four bits change what the toy predicts
    assert (kl["clusters"], kl["tokens"]) == (12, record.predictions["answer_tokens"].sum())
    assert kl["mean"] == pytest.approx(record.predictions["kl"].sum() / kl["tokens"])
    assert record.config["calibration"]["samples"] == 6
    assert record.run["seed"] == 0
    assert record.run["versions"]["torch"] == torch.__version__
    ((seen, questions, tracking, group),) = tracked
    assert seen.path == path
    assert len(questions) == 12
    assert tracking.mode == "offline"
    assert group == "sweep"


def test_a_recorded_cell_is_reused(
    cell: Any, tracked: Tracked, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = run(cell())
    assert f"wrote {path}" in capfd.readouterr().out
    written = {file.name: file.read_bytes() for file in path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "compute", None)
        assert run(cell("tracking=off", "threads=1")) == path
    assert capfd.readouterr().out == f"reused {path}\n"
    assert {file.name: file.read_bytes() for file in path.iterdir()} == written
    assert len(tracked) == 1

    assert run(cell("force=true")) == path
    assert len(tracked) == 2
    again = Record.load(path)
    pd.testing.assert_frame_equal(again.predictions, pd.read_parquet(path / "predictions.parquet"))
    assert (path / "bits.json").read_bytes() == written["bits.json"]
    assert (path / "metrics.json").read_bytes() == written["metrics.json"]
    assert (path / "predictions.parquet").read_bytes() == written["predictions.parquet"]


def test_a_damaged_record_is_computed_anew(cell: Any, capfd: pytest.CaptureFixture[str]) -> None:
    path = run(cell())
    metrics = (path / "metrics.json").read_text()
    (path / "metrics.json").write_text(metrics[:10])
    capfd.readouterr()
    assert run(cell()) == path
    out, err = capfd.readouterr()
    assert err.startswith(f"warning: {path}/metrics.json is not what the run wrote")
    assert f"wrote {path}" in out
    assert (path / "metrics.json").read_text() == metrics


def test_full_precision_is_evaluated_and_nothing_else(cell: Any) -> None:
    paths = {
        run(cell(*words)) for words in (["method=fp"], ["bits=fp"], ["method=fp", "bits=w6a6"])
    }
    (path,) = paths
    assert re.fullmatch(r"toy-fp-fp-[0-9a-f]{8}", path.name)
    record = Record.load(path)
    assert (record.method, record.bits, record.layers) == ("FP", "FP", [])
    assert list(record.run["stages"]) == ["load", "evaluate"]
    assert record.run["calibration"]["ids"] == []


def test_cells_that_differ_do_not_meet(cell: Any, tmp_path: Path) -> None:
    for words in ([], ["bits=w8a8"], ["evaluation.limit=5"], ["seed=1"]):
        run(cell(*words))
    records = find_records(tmp_path / "results" / "runs")
    assert len({record.run["hash"] for record in records}) == 4
    assert sorted(len(record.predictions) for record in records) == [5, 12, 12, 12]


def test_a_packed_model_answers_as_the_simulated_one(cell: Any, tmp_path: Path) -> None:
    simulated = Record.load(run(cell()))
    config = cell(f"save_packed={tmp_path}/packed")
    path = run(config)
    assert re.fullmatch(r"toy-rtn-w4a4-packed-[0-9a-f]{8}", path.name)
    packed = Record.load(path)
    assert list(packed.run["stages"]) == [*QUANTIZED_STAGES[:-2], "pack", "evaluate", "divergence"]
    assert packed.run["execution"] == "packed"
    assert sum(packed.run["kernels"].values()) > 0
    assert packed.run["weight_bytes"] < simulated.run["weight_bytes"] / 2
    assert packed.predictions["text"].equals(simulated.predictions["text"])
    # What is counted are the packed codes, of the same layers and no fewer than were simulated.
    assert [row["layer"] for row in packed.layers] == [row["layer"] for row in simulated.layers]
    assert all(0 < row["weight_levels"] <= 16 for row in packed.layers)
    assert all(1 < row["input_levels"] <= 16 for row in packed.layers)

    loaded = Record.load(run(cell(f"model.packed={tmp_path}/packed", "method=awq", "seed=5")))
    assert (loaded.method, loaded.bits, loaded.run["seed"]) == ("RTN", "W4A4", 5)
    assert list(loaded.run["stages"]) == ["load", "pack", "evaluate"]
    assert loaded.predictions["text"].equals(packed.predictions["text"])
    assert loaded.layers == packed.layers
    assert packed.metrics["kl"] == pytest.approx(simulated.metrics["kl"], rel=0.02)
    assert "kl" not in loaded.metrics  # there is no float model to compare with


def test_exact_execution_is_quantized_as_simulated_and_evaluated_as_packed(cell: Any) -> None:
    narrow = "model.dtype=float32"
    path = run(cell("execution=exact", narrow))
    assert re.fullmatch(r"toy-rtn-w4a4-exact-[0-9a-f]{8}", path.name)
    exact, simulated, packed = (
        Record.load(run(cell(f"execution={name}", narrow)))
        for name in ("exact", "simulated", "packed")
    )
    assert exact.run["execution"] == "exact"
    assert exact.run["kernels"] == {}
    assert list(exact.run["stages"]) == QUANTIZED_STAGES
    assert exact.layers == simulated.layers
    assert exact.run["weight_bytes"] > simulated.run["weight_bytes"]  # float64 weights
    assert exact.predictions["text"].equals(packed.predictions["text"])
    full = Record.load(run(cell("execution=exact", "method=fp", narrow)))
    assert full.run["execution"] == "simulated"


def test_simulated_execution_in_float64_is_exact(cell: Any) -> None:
    assert run(cell("execution=exact")) == run(cell())
    simulated, packed = (
        Record.load(run(cell(f"execution={name}"))) for name in ("simulated", "packed")
    )
    assert simulated.config["model"]["dtype"] == "float64"
    assert simulated.predictions["text"].equals(packed.predictions["text"])


def test_a_packed_cell_is_reused_as_long_as_its_checkpoint_is_there(
    cell: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = cell(f"save_packed={tmp_path}/packed")
    for said in ("wrote", "reused"):
        run(config)
        assert said in capsys.readouterr().out
    shutil.rmtree(tmp_path / "packed")
    run(config)
    assert "wrote" in capsys.readouterr().out
    run(cell(f"model.packed={tmp_path}/packed"))


def test_a_cell_may_end_once_its_packed_model_is_written(
    cell: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"save_packed={tmp_path}/packed", "evaluate=false"]
    for said in ("wrote", "reused"):
        assert run(cell(*words)) == tmp_path / "packed"
        assert capsys.readouterr().out == f"{said} {tmp_path}/packed\n"
    assert find_records(tmp_path / "results" / "runs") == []
    record = Record.load(run(cell(words[0])))  # the same cell, evaluated
    loaded = Record.load(run(cell(f"model.packed={tmp_path}/packed")))
    assert loaded.predictions["text"].equals(record.predictions["text"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["kernel=int_mm"], "Give execution=packed"),
        (["execution=fast"], "execution=fast .* simulated, exact, packed"),
        (["execution=exact", "save_packed=FULL"], "execution=exact is not for packed"),
        (["execution=exact", "model.packed=nowhere"], "execution=exact is not for packed"),
        (
            ["execution=packed", "kernel=int4_weight_only", "bits=w6a6", "model.dtype=float32"],
            "serves no layer",
        ),
        (["execution=packed", "kernel=fast"], "kernel=fast .* Choose one of: auto, "),
        (["model.packed=nowhere"], "model.packed: nowhere has no readable qvlm.json"),
        (["save_packed=FULL"], "save_packed=.* is not empty and holds no packed checkpoint"),
    ],
)
def test_what_cannot_be_packed_is_said(
    overrides: list[str], words: str, cell: Any, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "diary.txt").write_text("dear")
    with pytest.raises(UserError, match=words):
        run(cell(*(text.replace("FULL", str(full)) for text in overrides)))
    assert (full / "diary.txt").read_text() == "dear"
    assert os.listdir(tmp_path) == ["full"]


def test_the_seed_draws_the_calibration_samples(cell: Any) -> None:
    drawn = [inputs.draw_calibration(cell(f"seed={seed}"))[1] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    problems, rows = inputs.draw_calibration(cell())
    assert [p["question"] for p in problems] == [SPLITS["train"][row]["question"] for row in rows]


def test_calibration_draws_image_text_pairs_unless_told_otherwise(cell: Any) -> None:
    pictured = [row for row in range(20) if SPLITS["train"][row]["image"] is not None]
    assert 6 < len(pictured) < 20
    _, rows = inputs.draw_calibration(cell(f"calibration.samples={len(pictured)}"))
    assert rows == pictured
    _, rows = inputs.draw_calibration(cell("calibration.images=any", "calibration.samples=20"))
    assert rows == list(range(20))
    with pytest.raises(UserError, match=f"1 to {len(pictured)}, or calibration.images=any"):
        inputs.draw_calibration(cell(f"calibration.samples={len(pictured) + 1}"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "calibration.samples=21",
            "calibration.samples=21 .* with images. Give a number from 1 to ",
        ),
        ("model.weight_group_size=7", "group.size"),
    ],
)
def test_what_shows_late_is_the_users_error_too(
    override: str, words: str, cell: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words) as refusal:
        run(cell(override))
    assert "\n" not in str(refusal.value)
    assert os.listdir(tmp_path) == []


def test_truncated_weights_are_the_users_error(cell: Any, checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="broken"):
        run(cell(f"model.path={broken}"))
    assert os.listdir(tmp_path) == ["broken"]


def test_a_run_that_breaks_leaves_nothing(
    cell: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_(*_: Any, **__: Any) -> None:
        raise RunError("no answer can be parsed")

    monkeypatch.setattr(material, "evaluate", break_)
    with pytest.raises(RunError, match="parsed"):
        run(cell())
    assert os.listdir(tmp_path) == []


def test_a_killed_cell_goes_on_within_its_evaluation(
    cell: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["evaluation.batch_size=5"]
    undisturbed = Record.load(run(cell(*words)))
    assert "resumed_questions" not in undisturbed.run["stages"]["evaluate"]
    ask = InMemoryModel._batch

    def interrupted(self: InMemoryModel, start: int, requests: Any) -> list[str]:
        if start == 10:
            raise KeyboardInterrupt
        return ask(self, start, requests)

    def stop(*others: str) -> list[str]:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(InMemoryModel, "_batch", interrupted)
            run(cell(*words, *others, "force=true"))
        return [name for name in os.listdir(runs) if name.startswith(".")]

    runs = tmp_path / "results" / "runs"
    (answers,) = stop()
    assert answers.startswith(f".{undisturbed.name}.")
    run(cell("evaluation.batch_size=5", "seed=1"))  # another cell: it takes none of these
    assert len(stop("evaluation.max_new_tokens=3")) == 2
    shutil.rmtree(undisturbed.path)

    record = Record.load(run(cell(*words)))
    assert record.run["stages"]["evaluate"]["resumed_questions"] == 10
    pd.testing.assert_frame_equal(record.predictions, undisturbed.predictions)
    assert record.metrics == undisturbed.metrics
    assert not (runs / answers).exists()
    (other,) = (record for record in find_records(runs) if record.run["seed"] == 1)
    assert "resumed_questions" not in other.run["stages"]["evaluate"]


class Forgetful:
    """Quantizes all but one layer."""

    name = "Forgetful"

    def quantize(self, walk: Walk) -> MethodReport:
        for index, block in enumerate(walk.blocks()):
            samples = block.linear_inputs()
            for position, name in enumerate(block.linears):
                if (index, position) != (0, 1):
                    block.replace(name, block.quantize_linear(name, samples[name]))
        return MethodReport(search_seconds=np.float32(1.5), candidates=3)  # type: ignore[arg-type]


def test_a_layer_left_in_floating_point_is_recorded_and_said(
    cell: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    path = run(cell(f"method._target_={__name__}.Forgetful"))
    record = Record.load(path)
    (layer,) = record.run["exceeding"]
    (row,) = (row for row in record.layers if row["layer"] == layer)
    assert row["weight_levels"] > 16
    err = capfd.readouterr().err
    assert layer in err
    assert "warning" in err
    assert record.run["report"] == {"search_seconds": 1.5, "candidates": 3, "details": {}}
    assert record.method == "Forgetful"


def test_progress_is_silent_without_a_terminal(
    cell: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    run(cell())
    assert capfd.readouterr().err == ""


def test_only_models_of_full_size_keep_few_primitives(
    cell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, "3")
    inputs.settle(cell(), "cpu")
    assert os.environ[name] == "3"  # whoever runs it knows better
    monkeypatch.delenv(name)
    inputs.settle(load(), "cpu")
    assert name not in os.environ
    inputs.settle(cell(), "cpu")
    assert os.environ[name] == "16"


def test_stages_measure_time_and_memory() -> None:
    with Stages("cell", count=2) as stages:
        with stages.stage("small"):
            time.sleep(0.05)
        with stages.stage("large"):
            block = np.ones(2**25)  # 256 MiB
            time.sleep(0.05)
            del block
    small, large = stages.costs["small"], stages.costs["large"]
    assert small["seconds"] >= 0.05
    assert large["peak_mib"] - small["peak_mib"] > 200
    json.dumps(stages.costs)


def test_a_stage_that_breaks_is_not_measured() -> None:
    with pytest.raises(ZeroDivisionError), Stages("cell", count=1) as stages, stages.stage("bad"):
        raise ZeroDivisionError
    assert stages.costs == {}

"""One cell from configuration to record: the straight line of this project, on one screen.

    load model and data -> calibrate -> quantize -> prove the bits -> pack -> evaluate -> record

Nothing here depends on which model or method runs: a checkpoint is a folder, a method is whatever
`method._target_` names. Full precision skips what there is nothing to do for, simulated execution
does not pack, nor does exact execution, which evaluates in float64, and a model that was packed
before is proven and evaluated only. A streamed cell packs its model before the line begins
(`qvlm.streaming`).
"""

import shlex
import shutil
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from tqdm import tqdm

from qvlm.cell import inputs as prepare
from qvlm.cell.streaming import stream_cell
from qvlm.config.schema import RunConfig
from qvlm.evaluation import Evaluation, evaluate
from qvlm.methods.base import Method, MethodReport
from qvlm.models.loaded import LoadedModel
from qvlm.models.packed import save_packed_model
from qvlm.packing import (
    force_kernel,
    kernels_used,
    measure_packed_bits,
    pack_model,
    packed_layers,
    read_origin,
    weight_bytes,
)
from qvlm.quantization import (
    LayerBits,
    batch_by_length,
    check_bits,
    compute_in_float64,
    expected_layers,
    measure_bits,
)
from qvlm.records.locks import Lock
from qvlm.records.provenance import hardware, surroundings, versions
from qvlm.records.record import answers_folder, find_record, write_record
from qvlm.records.tracking import track
from qvlm.runtime import workers as processes
from qvlm.runtime.stages import ShownWalk, Stages

PROOF_QUESTIONS = 16


@dataclass
class Outcome:
    """What one cell brought to light.

    Attributes:
        weight_bytes: of all parameters and buffers, as the model was evaluated.
        kernels: packed product -> calls of it during the evaluation.
    """

    questions: datasets.Dataset
    evaluation: Evaluation
    stages: dict[str, dict[str, float]]
    report: MethodReport = field(default_factory=MethodReport)
    calibration_ids: list[int] = field(default_factory=list)
    uncalibrated: list[str] = field(default_factory=list)
    layers: list[LayerBits] = field(default_factory=list)
    weight_bytes: int = 0
    kernels: dict[str, int] = field(default_factory=dict)


def compute(
    config: RunConfig,
    method: Method,
    title: str,
    device: str,
    identity: str,
    answers: Path | None = None,
) -> Outcome:
    """The straight line, without its beginning and end on disk.

    Args:
        identity: the cell's hash, which a saved packed model is marked with.
        answers: a folder for the answers given so far, of this cell on this kind of machine.

    Raises:
        UserError: if checkpoint or data cannot be used.
        RunError: if something broke on the way.
    """
    found: dict[str, Any] = {}
    with Stages(title, _count_stages(config)) as stages:
        if config.stream:
            found |= stream_cell(config, method, device, identity, stages)
            config = prepare.streamed(config)
        kept = config.model.packed
        with stages.stage("load"):
            loaded = prepare.load(config, device)
            questions = prepare.load_questions(config)
        if not config.full_precision and kept is None:
            quantization = prepare.quantization_config(config)
            with stages.stage("calibrate"):
                samples, found["calibration_ids"] = prepare.draw_calibration(config)
                batches = batch_by_length(loaded, samples, config.calibration.batch_size)
            with stages.stage("quantize"):
                expected = expected_layers(loaded.model, quantization.vision_tower)
                walk = ShownWalk(loaded.model, batches, quantization)
                found["report"] = method.quantize(walk)
                found["uncalibrated"] = list(walk.uncalibrated)
            with stages.stage("prove"):
                proof = _proof_batches(config, loaded, questions)
                found["layers"] = measure_bits(loaded.model, expected, proof, quantization)
        if config.packed:
            with stages.stage("pack"):
                if kept is None:
                    pack_model(loaded.model, config.kernel)
                    if config.save_packed is not None:
                        origin = {"config": asdict(config), "expected": expected, "hash": identity}
                        save_packed_model(loaded, Path(config.save_packed), origin)
                else:
                    force_kernel(loaded.model, config.kernel)
                    expected = read_origin(kept)["expected"]
                proof = _proof_batches(config, loaded, questions)
                found["layers"] = measure_packed_bits(loaded.model, expected, proof)
                for layer in packed_layers(loaded.model).values():
                    layer.used.clear()  # what the evaluation uses is recorded
        if config.execution == "exact":
            compute_in_float64(loaded.model)
        with stages.stage("evaluate"):
            options = asdict(config.evaluation)
            del options["limit"]  # the questions are limited already
            if config.packed:
                options["observe"] = kernels_used
            evaluation = evaluate(loaded, questions, seed=config.seed, answers=answers, **options)
    if evaluation.resumed:  # the stage's seconds are those of the other questions only
        stages.costs["evaluate"]["resumed_questions"] = evaluation.resumed
    if config.packed:
        found["kernels"] = dict(sum(map(Counter, evaluation.observed), Counter()))
    return Outcome(
        questions, evaluation, stages.costs, weight_bytes=weight_bytes(loaded.model), **found
    )


def _count_stages(config: RunConfig) -> int:
    """How many stages a cell has."""
    if config.full_precision:
        return 2
    if config.stream:
        return 5
    return 3 if config.model.packed else 5 + config.packed


def _proof_batches(
    config: RunConfig, loaded: LoadedModel, questions: datasets.Dataset
) -> list[dict[str, Tensor]]:
    """A few questions with their answers, to watch a model compute on."""
    some = [questions[row] for row in range(min(PROOF_QUESTIONS, len(questions)))]
    size = config.calibration.batch_size
    return [
        loaded.encode(some[start : start + size], with_target=True)
        for start in range(0, len(some), size)
    ]


def run_cell(config: RunConfig) -> Path:
    """Computes one cell, or finds it recorded, and returns the folder of its record.

    Raises:
        UserError: if configuration, checkpoint or data cannot be used; nothing is written then.
        Held: if another process computes it.
        RunError: if something broke on the way; no record is written then.
    """
    config = prepare.adopt(config)
    identity = prepare.check(config)
    path = prepare.record_path(config, identity)
    if not prepare.is_recorded(config, identity):
        with Lock(path) as lock:
            # Another process may have written it just before this one had the lock.
            if not prepare.is_recorded(config, identity):
                return _compute_and_record(config, identity, path, lock)
    found = Path(str(config.save_packed)) if config.only_written else path
    tqdm.write(f"reused {found}")
    return found


def _compute_and_record(
    config: RunConfig, identity: dict[str, Any], path: Path, lock: Lock
) -> Path:
    _, damage = find_record(path, identity["hash"])
    if damage:
        tqdm.write(f"warning: {damage}; computing it anew", file=sys.stderr)

    method = prepare.build_method(config.method)
    device = prepare.find_device(config.device)
    processes.everywhere(prepare.settle, config, device)
    if config.only_written:
        with Stages(path.name, 2) as stages:
            stream_cell(config, method, device, identity["hash"], stages)
        tqdm.write(f"wrote {config.save_packed}")
        return Path(str(config.save_packed))
    machine = hardware()
    place = {"device": device.partition(":")[0], "cpu": machine["cpu"], "gpu": str(machine["gpu"])}
    answers = answers_folder(path, identity["hash"], place | versions())
    if config.force:
        shutil.rmtree(answers, ignore_errors=True)
    outcome = compute(config, method, path.name, device, identity["hash"], answers)
    exceeding = check_bits(outcome.layers)
    if exceeding:
        tqdm.write(
            f"warning: {path.name}: {len(exceeding)} layers take more values than their bits "
            f"allow, first {exceeding[0]}; tables refuse this cell",
            file=sys.stderr,
        )
    run = {
        **identity,
        "model": config.model.name,
        "method": method.name,
        "method_name": config.method_name,
        "bits": config.bits.label,
        "seed": config.seed,
        "execution": config.execution,
        "kernels": outcome.kernels,
        "weight_bytes": outcome.weight_bytes,
        "device": device,
        "processes": processes.count(),
        "questions_per_process": outcome.evaluation.shares,
        "threads": torch.get_num_threads(),
        "command": shlex.join(["python", *sys.argv]),
        "started": lock.owner.started,
        "slurm_job": lock.owner.job or None,
        "slurm_restarts": lock.owner.restarts,
        "stages": outcome.stages,
        "calibration": {"split": config.calibration.split, "ids": outcome.calibration_ids},
        "uncalibrated": outcome.uncalibrated,
        "report": asdict(outcome.report),
        "exceeding": exceeding,
        **surroundings(),
    }
    layers = [asdict(layer) for layer in outcome.layers]
    metrics, predictions = outcome.evaluation.metrics, outcome.evaluation.predictions
    lock.confirm()
    record = write_record(path, asdict(config), run, metrics, predictions, layers)
    shutil.rmtree(answers, ignore_errors=True)
    track(record, outcome.questions, config.tracking, config.group)
    tqdm.write(f"wrote {path}")
    return path

"""One cell from configuration to record: the straight line of this project, on one screen.

    load model and data -> calibrate -> quantize -> prove the bits -> evaluate -> record

Nothing here depends on which model or method runs: a checkpoint is a folder, a method is whatever
`method._target_` names. Full precision skips what there is nothing to do for.
"""

import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from tqdm import tqdm

from qvlm import prepare
from qvlm.config import RunConfig, canonical
from qvlm.evaluation import Evaluation, evaluate
from qvlm.methods.base import Method, MethodReport
from qvlm.provenance import hardware, surroundings, versions
from qvlm.quantization import (
    Block,
    LayerBits,
    Walk,
    batch_by_length,
    check_bits,
    expected_layers,
    measure_bits,
)
from qvlm.records import answers_folder, find_record, write_record
from qvlm.stages import Stages
from qvlm.tracking import track

PROOF_QUESTIONS = 16


@dataclass
class Outcome:
    """What one cell brought to light."""

    questions: datasets.Dataset
    evaluation: Evaluation
    stages: dict[str, dict[str, float]]
    report: MethodReport = field(default_factory=MethodReport)
    calibration_ids: list[int] = field(default_factory=list)
    uncalibrated: list[str] = field(default_factory=list)
    layers: list[LayerBits] = field(default_factory=list)


def compute(
    config: RunConfig, method: Method, title: str, device: str, answers: Path | None = None
) -> Outcome:
    """The straight line, without its beginning and end on disk.

    Args:
        answers: a folder for the answers given so far, of this cell on this kind of machine.

    Raises:
        UserError: if checkpoint or data cannot be used.
        RunError: if something broke on the way.
    """
    found: dict[str, Any] = {}
    with Stages(title, count=2 if config.full_precision else 5) as stages:
        with stages.stage("load"):
            loaded = prepare.load(config, device)
            questions = prepare.load_questions(config)
        if not config.full_precision:
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
                some = [questions[row] for row in range(min(PROOF_QUESTIONS, len(questions)))]
                size = config.calibration.batch_size
                proof = [
                    loaded.encode(some[start : start + size], with_target=True)
                    for start in range(0, len(some), size)
                ]
                found["layers"] = measure_bits(loaded.model, expected, proof, quantization)
        with stages.stage("evaluate"):
            options = asdict(config.evaluation)
            del options["limit"]  # the questions are limited already
            evaluation = evaluate(loaded, questions, seed=config.seed, answers=answers, **options)
    if evaluation.resumed:  # the stage's seconds are those of the other questions only
        stages.costs["evaluate"]["resumed_questions"] = evaluation.resumed
    return Outcome(questions, evaluation, stages.costs, **found)


def run_cell(config: RunConfig) -> Path:
    """Computes one cell, or finds it recorded, and returns the folder of its record.

    Raises:
        UserError: if configuration, checkpoint or data cannot be used; nothing is written then.
        RunError: if something broke on the way; no record is written then.
    """
    config = canonical(config)
    identity = prepare.check(config)
    path = prepare.record_path(config, identity)
    record, damage = find_record(path, identity["hash"])
    if record and not config.force:
        tqdm.write(f"reused {path}")
        return path
    if damage:
        tqdm.write(f"warning: {damage}; computing it anew", file=sys.stderr)

    method = prepare.build_method(config.method)
    device = prepare.find_device(config.device)
    prepare.settle(config, device)
    machine = hardware()
    place = {"device": device.partition(":")[0], "cpu": machine["cpu"], "gpu": str(machine["gpu"])}
    answers = answers_folder(path, identity["hash"], place | versions())
    if config.force:
        shutil.rmtree(answers, ignore_errors=True)
    outcome = compute(config, method, path.name, device, answers)
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
        "device": device,
        "threads": torch.get_num_threads(),
        "command": shlex.join(["python", *sys.argv]),
        "stages": outcome.stages,
        "calibration": {"split": config.calibration.split, "ids": outcome.calibration_ids},
        "uncalibrated": outcome.uncalibrated,
        "report": asdict(outcome.report),
        "exceeding": exceeding,
        **surroundings(),
    }
    layers = [asdict(layer) for layer in outcome.layers]
    metrics, predictions = outcome.evaluation.metrics, outcome.evaluation.predictions
    record = write_record(path, asdict(config), run, metrics, predictions, layers)
    shutil.rmtree(answers, ignore_errors=True)
    track(record, outcome.questions, config.tracking, config.group)
    tqdm.write(f"wrote {path}")
    return path


class ShownWalk(Walk):
    """The calibration walk with a progress bar over its blocks."""

    def blocks(self, partition: Sequence[Sequence[str]] | None = None) -> Iterator[Block]:
        """The blocks in execution order."""
        total = len(self.names if partition is None else partition)
        with tqdm(total=total, desc="blocks", unit="block", leave=False, disable=None) as bar:
            for block in super().blocks(partition):
                bar.set_postfix_str(block.name)
                yield block
                bar.update()

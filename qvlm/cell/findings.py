"""What a cell finds out, and how a record holds it."""

from dataclasses import asdict, dataclass, field
from typing import Any

import datasets
import torch

from qvlm.cell.identity import Cell
from qvlm.evaluation.evaluator import Evaluation
from qvlm.methods.base import MethodReport
from qvlm.quantization import LayerBits, check_bits
from qvlm.records.environment import command_line, surroundings
from qvlm.records.locks import Owner
from qvlm.runtime import workers


@dataclass
class Quantized:
    """What quantizing a model found out.

    Attributes:
        report: What the method reports of itself.
        calibration_ids: Rows of the calibration problems in their split.
        uncalibrated: Names of the layers that no calibration problem reached.
    """

    report: MethodReport = field(default_factory=MethodReport)
    calibration_ids: list[int] = field(default_factory=list)
    uncalibrated: list[str] = field(default_factory=list)


@dataclass
class Findings:
    """What a cell found out on its way from checkpoint to answers.

    Attributes:
        stages: Seconds and peak memory by the name of the stage; see `qvlm.runtime.stages`.
        quantized: What quantizing found out.
        layers: Levels that were counted in each quantized layer, and levels that its bits allow.
        problems: Problems that were evaluated.
        evaluation: Answers and metrics, or None if the model was not evaluated.
        weight_bytes: Bytes of all parameters and buffers of the model that was evaluated.
        kernels: Number of calls during the evaluation by kernel.
        kernel_choices: What packed layers chose and what they measured, in the first process.
    """

    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    quantized: Quantized = field(default_factory=Quantized)
    layers: list[LayerBits] = field(default_factory=list)
    problems: datasets.Dataset | None = None
    evaluation: Evaluation | None = None
    weight_bytes: int = 0
    kernels: dict[str, int] = field(default_factory=dict)
    kernel_choices: list[dict[str, Any]] = field(default_factory=list)

    @property
    def exceeding(self) -> list[str]:
        """Names of the layers that take more values than their bits allow."""
        return check_bits(self.layers)


def describe_run(
    cell: Cell, findings: Findings, method_name: str, device: str, owner: Owner
) -> dict[str, Any]:
    """Makes the content of `run.json`.

    Args:
        cell: Cell that was computed.
        findings: What it found out, with an evaluation.
        method_name: Name of the method in tables.
        device: Device that the cell was computed on.
        owner: Process that computed it.
    """
    config, evaluation, quantized = cell.config, findings.evaluation, findings.quantized
    assert evaluation is not None
    return {
        **cell.identity,
        "model": config.model.name,
        "method": method_name,
        "method_name": config.method_name,
        "seed": config.seed,
        "execution": config.execution,
        "kernels": findings.kernels,
        "kernel_choices": findings.kernel_choices,
        "weight_bytes": findings.weight_bytes,
        "device": device,
        "processes": workers.world_size(),
        "questions_per_process": evaluation.shares,
        "threads": torch.get_num_threads(),
        "command": command_line(),
        "started": owner.started,
        "slurm_job": owner.job or None,
        "slurm_restarts": owner.restarts,
        "stages": findings.stages,
        "calibration": {"split": config.calibration.split, "ids": quantized.calibration_ids},
        "uncalibrated": quantized.uncalibrated,
        "report": asdict(quantized.report),
        "exceeding": findings.exceeding,
        **surroundings(),
    }

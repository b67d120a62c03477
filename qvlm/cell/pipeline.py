"""One cell from configuration to record. `compute` is the line of this project, on one screen.

    load model and data -> calibrate -> quantize -> prove the bits -> pack -> evaluate -> record

Nothing here depends on which model or method runs: a checkpoint is a folder, and a method is what
`method._target_` names. Full precision is loaded and evaluated. Only execution=packed packs, and
execution=exact evaluates in float64. A checkpoint that is packed already is proven and evaluated.
A streamed cell writes such a checkpoint first (`qvlm.cell.streaming`) and goes on from it. With
evaluate=false a cell ends once its packed model is written.
"""

import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from qvlm.cell import inputs
from qvlm.cell.findings import Findings, Quantized, describe_run
from qvlm.cell.identity import Cell
from qvlm.cell.material import load_material
from qvlm.cell.method import method_of
from qvlm.cell.origin import describe_origin, expected_of, require_bits
from qvlm.cell.streaming import stream_cell
from qvlm.cell.walk import ProgressWalk
from qvlm.evaluation.adapter import Watch
from qvlm.methods.base import Method
from qvlm.models.loaded import LoadedModel
from qvlm.models.packed import save_packed_model
from qvlm.packing import (
    force_kernel,
    kernel_choices,
    measure_packed_bits,
    pack_model,
    packed_layers,
    weight_bytes,
)
from qvlm.quantization import (
    LayerBits,
    compute_in_float64,
    expected_layers,
    measure_bits,
)
from qvlm.records.environment import command_line, hardware, versions
from qvlm.records.locks import Lock
from qvlm.records.record import Record, answers_folder, write_record
from qvlm.records.tracking import Tracker
from qvlm.runtime import workers
from qvlm.runtime.stages import Stages


def compute(
    cell: Cell,
    method: Method,
    device: str,
    answers: Path | None = None,
    watch: Watch | None = None,
) -> Findings:
    """Runs a cell without looking for its record or writing it.

    Args:
        cell: Cell to run.
        method: Method of the cell.
        device: Device to run on, as `find_device` resolves it.
        answers: Folder that keeps the answers given so far, by this cell on this kind of machine.
        watch: Function that is told how far the evaluation is.

    Raises:
        UserError: if checkpoint or data cannot be used.
        RunError: if something broke on the way.
    """
    config, found = cell.config, Findings()
    with Stages(cell.path.name, _count_stages(cell)) as stages:
        found.stages = stages.costs
        if config.stream:
            found.quantized = stream_cell(cell, method, device, stages)
            if not config.evaluate:
                return found
        with stages.stage("load"):
            loaded = inputs.load(config, device)
            material = load_material(config, loaded)
            found.problems = material.problems
        expected: list[str] = []
        if not config.full_precision and config.packed_source is None:
            quantization = inputs.quantization_config(config)
            expected = expected_layers(loaded.model, quantization.vision_tower)
            with stages.stage("calibrate"):
                batches, ids = material.calibration()
            if config.evaluate and material.compares:
                with stages.stage("reference"):
                    material.refer(cell)
            with stages.stage("quantize"):
                walk = ProgressWalk(loaded.model, batches, quantization)
                report = method.quantize(walk)
                found.quantized = Quantized(report, ids, list(walk.uncalibrated))
            with stages.stage("prove"):
                found.layers = measure_bits(loaded.model, expected, material.proof(), quantization)
        if config.packed:
            with stages.stage("pack"):
                proof = material.proof()
                found.layers = _pack(cell, loaded, method, expected, proof, found.quantized)
        if config.execution == "exact":
            compute_in_float64(loaded.model)
        if config.evaluate:
            with stages.stage("evaluate"):
                found.evaluation = material.evaluate(cell, answers, watch)
        if found.evaluation is not None and material.referred:
            with stages.stage("divergence"):
                found.evaluation = material.compare(found.evaluation)
    if found.evaluation is not None:
        if found.evaluation.resumed:  # the stage took the seconds of the other questions only
            stages.costs["evaluate"]["resumed_questions"] = found.evaluation.resumed
        found.kernels = dict(sum(map(Counter, found.evaluation.observed), Counter()))
        found.kernel_choices = kernel_choices(loaded.model)
        found.weight_bytes = weight_bytes(loaded.model)
    return found


def run_cell(cell: Cell) -> Path:
    """Computes a cell, or finds it recorded, and returns the folder that it leaves.

    Raises:
        UserError: if checkpoint or data cannot be used; nothing is written then.
        Held: if another process computes the cell.
        RunError: if something broke on the way; no record is written then.
    """
    if not cell.is_recorded():
        with Lock(cell.path) as lock:
            # Another process may have written the record just before this one had the lock.
            if not cell.is_recorded():
                _compute_and_record(cell, lock)
                tqdm.write(f"wrote {cell.result}")
                return cell.result
    tqdm.write(f"reused {cell.result}")
    return cell.result


def _compute_and_record(cell: Cell, lock: Lock) -> None:
    config, path = cell.config, cell.path
    _, damage = cell.find_record()
    if damage:
        tqdm.write(f"warning: {damage}; computing it anew", file=sys.stderr)

    method, device = method_of(config), inputs.find_device(config.device)
    workers.run_on_all_ranks(inputs.settle, config, device)
    answers = _answers_folder(cell, device)
    if config.force:
        shutil.rmtree(answers, ignore_errors=True)
    with Tracker(
        config.tracking,
        config.group,
        path.name,
        [config.model.name, method.name, config.bits.label],
        command_line(),
        asdict(config),
    ) as tracker:
        found = compute(cell, method, device, answers, tracker.progress)
        record = _record(cell, method, device, found, lock)
        if record is not None:
            shutil.rmtree(answers, ignore_errors=True)
            tracker.finish(record, found.problems)


def _record(cell: Cell, method: Method, device: str, found: Findings, lock: Lock) -> Record | None:
    """Writes the record of a cell, unless the cell was not evaluated, and returns it."""
    config, path = cell.config, cell.path
    if found.exceeding:
        tqdm.write(
            f"warning: {path.name}: {len(found.exceeding)} layers take more values than their bits "
            f"allow, first {found.exceeding[0]}; tables refuse this cell",
            file=sys.stderr,
        )
    if found.evaluation is None:
        return None
    run = describe_run(cell, found, method.name, device, lock.owner)
    layers = [asdict(layer) for layer in found.layers]
    metrics, predictions = found.evaluation.metrics, found.evaluation.predictions
    lock.confirm()
    return write_record(path, asdict(config), run, metrics, predictions, layers)


def _pack(
    cell: Cell,
    loaded: LoadedModel,
    method: Method,
    expected: Sequence[str],
    proof: Sequence[Mapping[str, Tensor]],
    quantized: Quantized,
) -> list[LayerBits]:
    """Packs the model and saves it, if it is not packed already, and counts its levels.

    Args:
        cell: Cell of the model.
        loaded: Quantized or packed model.
        method: Method of the cell.
        expected: Names of the layers that must be packed, if the model is not packed already.
        proof: Batches to count the levels on.
        quantized: What quantizing the model found out.

    Raises:
        UserError: if a checkpoint was packed before and does not have the bits that it states.
    """
    config = cell.config
    if config.packed_source is not None:
        force_kernel(loaded.model, config.kernel)
        expected = expected_of(loaded, config)
    else:
        pack_model(loaded.model, config.kernel)
        if config.save_packed is not None:
            origin = describe_origin(cell, loaded, method.name, expected, quantized)
            save_packed_model(loaded, Path(config.save_packed), origin)
    layers = measure_packed_bits(loaded.model, expected, proof)
    if config.packed_source is not None:
        require_bits(loaded, config, layers)
    for layer in packed_layers(loaded.model).values():
        layer.used.clear()  # only the kernels of the evaluation are recorded
    return layers


def _count_stages(cell: Cell) -> int:
    """The number of stages that `compute` goes through at most."""
    config = cell.config
    if config.full_precision:
        return 2
    if config.stream:
        return 5 if config.evaluate else 2
    if config.model.packed:
        return 2 + config.evaluate
    compares = config.evaluate and inputs.compared_problems(config) > 0
    return 4 + config.packed + config.evaluate + 2 * compares


def _answers_folder(cell: Cell, device: str) -> Path:
    """The folder for answers that this kind of machine, with these packages, would give again."""
    machine = hardware()
    kind = {"device": device.partition(":")[0], "cpu": machine["cpu"], "gpu": str(machine["gpu"])}
    return answers_folder(cell.path, cell.hash, kind | versions())

"""Computes cells and prints what they came out as: `python -m qvlm.tables.portable.worker`.

The job comes as JSON on stdin, with the fields of `Job`. For every cell a line of JSON goes to
stdout, with the fields of `Outcome`.
"""

import hashlib
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from qvlm.cell import inputs
from qvlm.cell.method import method_of
from qvlm.config.compose import CONF, from_hydra, register
from qvlm.config.schema import RunConfig
from qvlm.evaluation.evaluator import evaluate
from qvlm.models.loaded import LoadedModel
from qvlm.packing import force_kernel, kernels, pack_model, packed_layers
from qvlm.quantization import Walk, batch_by_length


@dataclass(frozen=True)
class Job:
    """What a worker computes.

    Attributes:
        cells: Overrides of each cell, as on the command line.
        threads: Number of PyTorch's threads.
        packed: How the packed model answers: with "every" kernel that sums in float64, with those
            that "auto" chooses, or with "none", which is not at all.
    """

    cells: list[list[str]]
    threads: int
    packed: str = "auto"


@dataclass(frozen=True)
class Outcome:
    """What a cell came out as.

    Attributes:
        cell: Overrides of the cell.
        tensors: SHA-256 of each tensor of the packed model, by name.
        answers: Texts of the answers, by execution: "simulated", and "packed" with the kernel.
        candidates: Number of candidates that the method tried.
    """

    cell: list[str]
    tensors: dict[str, str]
    answers: dict[str, list[str]]
    candidates: int


def compute(overrides: Sequence[str], packed: str) -> Outcome:
    """Quantizes a model, asks it, packs it and asks it again; see `Job` for `packed`."""
    config = inputs.settle_evaluation(_config(overrides))
    inputs.settle(config, "cpu")
    loaded = inputs.load(config, "cpu")
    samples, _ = inputs.draw_calibration(config)
    batches = batch_by_length(loaded, samples, config.calibration.batch_size)
    walk = Walk(loaded.model, batches, inputs.quantization_config(config))
    report = method_of(config).quantize(walk)
    answers = {"simulated": _answers(loaded, config)}
    pack_model(loaded.model)
    tensors = {
        name: hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
        for name, tensor in loaded.model.state_dict().items()
    }
    names = {"none": [], "auto": [kernels.AUTO], "every": _kernels(loaded)}
    for kernel in names[packed]:
        for layer in packed_layers(loaded.model).values():
            layer.kernel = kernels.AUTO
        force_kernel(loaded.model, kernel)
        answers[f"packed, {kernel}"] = _answers(loaded, config)
    return Outcome(list(overrides), tensors, answers, report.candidates)


def _config(overrides: Sequence[str]) -> RunConfig:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [*overrides, "device=cpu"], return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        return from_hydra(config)


def _answers(loaded: LoadedModel, config: RunConfig) -> list[str]:
    options, problems = config.evaluation, inputs.load_problems(config)
    assert options.max_new_tokens is not None
    found = evaluate(
        loaded,
        problems,
        options.batch_size,
        options.max_new_tokens,
        options.unparsable,
        config.seed,
        temperature=options.temperature,
    )
    return list(found.predictions["text"])


def _kernels(loaded: LoadedModel) -> list[str]:
    """The kernels that sum in float64 for any layer of the model."""
    layers = packed_layers(loaded.model).values()
    return [
        kernel.name
        for kernel in kernels.KERNELS
        if any(kernel.obstacle(layer) is None and kernel.sums_in_float64(layer) for layer in layers)
    ]


def main() -> None:
    """Reads the job and computes its cells."""
    warnings.simplefilter("ignore")
    job = Job(**json.load(sys.stdin))
    torch.set_num_threads(job.threads)
    for cell in job.cells:
        print(json.dumps(asdict(compute(cell, job.packed))), flush=True)


if __name__ == "__main__":
    main()

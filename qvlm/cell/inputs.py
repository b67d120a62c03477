"""What a cell works with: checkpoint and model, problems, quantizer, device and prompt."""

import os
import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers

from qvlm.config.schema import MAP, RunConfig
from qvlm.data.prompts import Prompting
from qvlm.data.scienceqa import load_scienceqa, open_scienceqa, require_published
from qvlm.errors import UserError
from qvlm.models.checkpoints.hub import local_folder
from qvlm.models.load import embedded, load_model
from qvlm.models.loaded import LoadedModel
from qvlm.models.placement import distribute, memory_limits
from qvlm.quantization import QuantizationConfig, QuantSpec
from qvlm.runtime import precision, workers

MPS = "mps"  # the GPU of a Mac, which PyTorch chooses only if it is named
MINIATURE_ANSWER = 64  # tokens
MINIATURE_COMPARED, OTHERS_COMPARED = 1024, 128  # problems


def quantization_config(config: RunConfig) -> QuantizationConfig:
    """Which tensors are quantized how, at the bit widths of a cell.

    Raises:
        UserError: if an option of the quantizer is wrong.
    """
    bits, quantizer = config.bits, config.quantizer
    assert bits.weights is not None
    assert bits.activations is not None
    specs = {}
    for part, width in (
        ("weight", bits.weights),
        ("vision_weight", bits.weights),
        ("language", bits.activations),
        ("vision", bits.activations),
    ):
        shape = getattr(quantizer, part)
        try:
            specs[part] = QuantSpec(
                width,
                shape.granularity,
                shape.group_size,
                quantizer.p,
                quantizer.ranges,
                quantizer.static_width if part == "language" else None,
            )
        except UserError as error:
            raise UserError(f"quantizer, {part}: {error}") from error
    try:
        return QuantizationConfig(
            **specs, vision_tower=quantizer.vision_tower, first_token=quantizer.first_token
        )
    except UserError as error:
        raise UserError(f"quantizer: {error}") from error


def prompting(config: RunConfig) -> Prompting:
    """Prompt format and conversation template of the checkpoint.

    Raises:
        UserError: if one of the two is unknown.
    """
    return Prompting(config.model.prompt_format, config.model.conversation)


def answer_length(config: RunConfig) -> int:
    """Number of tokens after which an answer is cut off.

    Unless `evaluation.max_new_tokens` says it, it is what the prompt format needs: 1,024 for the
    formats that reason before they answer, and 64 for letters. The embedded miniatures, which
    reason briefly, have `MINIATURE_ANSWER`.
    """
    if config.evaluation.max_new_tokens is not None:
        return config.evaluation.max_new_tokens
    if embedded(config.model.path):
        return MINIATURE_ANSWER
    return prompting(config).max_new_tokens


def compared_problems(config: RunConfig) -> int:
    """Number of problems on which a quantized model is compared with full precision.

    Unless `evaluation.kl_problems` says it, it is 1,024 for an embedded miniature, whose states
    take 18 MiB and 4 seconds, and 128 for any other model.
    """
    if config.evaluation.kl_problems is not None:
        return config.evaluation.kl_problems
    return MINIATURE_COMPARED if embedded(config.model.path) else OTHERS_COMPARED


def settle_evaluation(config: RunConfig) -> RunConfig:
    """Puts the numbers that null stands for in the options of the evaluation.

    Tasks of lm-eval limit answers themselves, and nothing is compared with full precision.
    """
    if config.tasks.names:
        return replace(config, evaluation=replace(config.evaluation, kl_problems=0))
    evaluation = replace(
        config.evaluation,
        max_new_tokens=answer_length(config),
        kl_problems=compared_problems(config),
    )
    return replace(config, evaluation=evaluation)


def checkpoint_folder(config: RunConfig) -> Path:
    """The folder of the checkpoint that a cell is identified by. Fetches it from the Hub if needed.

    Raises:
        UserError: if there is no such checkpoint.
    """
    if config.model.packed is not None:
        return local_folder(config.model.packed, "model.packed")
    path, made_by = config.model.path, config.model.made_by
    if made_by is not None and not Path(path).is_dir():
        raise UserError(
            f"model.path: {path} is not a folder. Give the command {made_by}, or a folder with the "
            "checkpoint."
        )
    return embedded(path) or local_folder(path, "model.path")


def gains_no_threads(config: RunConfig) -> bool:
    """Whether a cell runs on a CPU and its products are too small for a second thread."""
    return embedded(config.model.path) is not None and find_device(config.device) == "cpu"


def find_device(name: str) -> str:
    """Resolves "auto" for rank 0, and refuses a device that this machine does not have.

    Returns:
        "cpu", "map", "mps", or "cuda" with the number of a GPU.

    Raises:
        UserError: if there is no such device, or there are more ranks than GPUs.
    """
    gpus = torch.cuda.device_count()
    present = ["cpu", *(f"cuda:{index}" for index in range(gpus)), *([MAP] if gpus else [])]
    if torch.backends.mps.is_available():
        present.append(MPS)
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name not in present and (name != "cuda" or not gpus):
        raise UserError(
            f"device={name} is not on this machine. Choose one of: auto, {', '.join(present)}."
        )
    if workers.world_size() > 1 and name != "cpu":
        if name != "cuda":
            raise UserError(
                f"device={name} is not for {workers.world_size()} processes. Choose one of: auto, "
                "cuda (a GPU for each process), cpu."
            )
        if workers.local_world_size() > gpus:
            raise UserError(
                f"device={name} is not possible: {workers.local_world_size()} processes need a GPU "
                f"each, and this machine has {gpus}. Start fewer, or give device=cpu."
            )
    return "cuda:0" if name == "cuda" else name


def settle(config: RunConfig, device: str) -> None:
    """Prepares a process for a cell.

    Seeds every random number generator, asks for deterministic kernels, and turns off the progress
    bars of libraries, which show even without a terminal.
    """
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if device != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    elif not embedded(config.model.path):
        keep_few_primitives()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def keep_few_primitives() -> None:
    """Limits oneDNN's cache to 16 primitives, unless the environment sets another limit.

    oneDNN multiplies bf16 matrices on a CPU. It makes a primitive for every number of rows that it
    meets and keeps 1,024 of them. A mixture of experts meets hundreds of row counts, which takes a
    quarter of a GiB in one question; docs/LOG.md says what the limit costs in time. Call this
    before the first matrix product.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")


def load(config: RunConfig, device: str) -> LoadedModel:
    """Loads the model that a cell evaluates: in floating point, or packed.

    Raises:
        UserError: if a file of the checkpoint is missing, truncated or does not fit.
    """
    packed = config.packed_source
    folder = local_folder(packed, "model.packed") if packed else checkpoint_folder(config)
    loaded = _load(config, folder, "cpu" if device == MAP else device)
    if device == MAP:
        simulated = not config.full_precision and packed is None
        distribute(loaded.model, memory_limits(config.max_memory), to_be_quantized=simulated)
    return loaded


def load_for_streaming(config: RunConfig, device: str) -> LoadedModel:
    """Loads the float model with its decoder layers on the meta device.

    Raises:
        UserError: if a file of the checkpoint is missing, truncated or does not fit.
    """
    return _load(config, checkpoint_folder(config), device, meta_layers=True)


def _load(config: RunConfig, folder: Path, device: str, meta_layers: bool = False) -> LoadedModel:
    model = config.model
    advice = precision.advice(model.dtype, device)
    if advice is not None and config.device != MAP:
        warnings.warn(advice, RuntimeWarning, stacklevel=2)
    return load_model(
        folder,
        model.name,
        prompting(config),
        device,
        model.dtype,
        vision_tower=model.vision_tower if meta_layers or config.packed_source is None else None,
        image_size=model.image_size,
        image_fit=model.image_fit,
        expert_capacity=model.expert_capacity,
        meta_layers=meta_layers,
    )


def load_problems(config: RunConfig, with_images: bool = True) -> datasets.Dataset:
    """Loads the problems to evaluate.

    Args:
        config: Configuration of the cell.
        with_images: Whether problems with an image are among them, which not every model reads.

    Raises:
        UserError: if they cannot be loaded, or are not as many as were published.
    """
    data, limit = config.data, config.evaluation.limit
    problems = load_scienceqa(data.source, data.split, limit, data.seed, with_images)
    if data.published and data.split == "test" and limit is None and with_images:
        require_published(problems, data.source)
    return problems


def draw_calibration(
    config: RunConfig, with_images: bool = True
) -> tuple[list[dict[str, Any]], list[int]]:
    """Draws the calibration problems without replacement.

    Args:
        config: Configuration of the cell.
        with_images: Whether the model reads images.

    Returns:
        The problems, and their rows in the split, in ascending order.

    Raises:
        UserError: if the split has fewer, or problems with an image are for a model without tower.
    """
    data, calibration = config.data, config.calibration
    pool = open_scienceqa(data.source, calibration.split, data.seed)
    count, images = calibration.samples, calibration.images
    if not with_images and images != "none":
        raise UserError(
            f"calibration.images={images} is not for model {config.model.name}, which reads no "
            "image. Give calibration.images=none."
        )
    order = random.Random(calibration.seed).sample(range(len(pool)), len(pool))
    if images != "any":
        order = [row for row in order if pool.has_image[row] == (images == "only")]
    if count > len(order):
        kind = {"only": " with images", "none": " without images", "any": ""}[images]
        raise UserError(
            f"calibration.samples={count} is more than split {calibration.split} has{kind}. Give a "
            f"number from 1 to {len(order)}"
            f"{', or calibration.images=any' if images == 'only' else ''}."
        )
    rows = sorted(order[:count])
    return list(pool.take(rows)), rows

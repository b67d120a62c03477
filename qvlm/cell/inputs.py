"""Turns a configuration into the things that a cell works with, and says early if it cannot.

`check` runs before any cell of a sweep does: it builds everything that is cheap to build, so that a
mistyped option costs seconds and not the hours of the cells before it. What only shows once model
and data are loaded (a truncated checkpoint, a missing column, too small a split) is a `UserError`
of the cell itself, which has written nothing by then.
"""

import inspect
import os
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qvlm.config.schema import MAP, RunConfig, canonical, influences
from qvlm.data.prompts import Prompting
from qvlm.data.scienceqa import load_scienceqa, open_scienceqa, require_published
from qvlm.errors import UserError
from qvlm.methods.base import Method
from qvlm.models.checkpoints.hub import local_folder
from qvlm.models.load import embedded, load_model
from qvlm.models.loaded import LoadedModel
from qvlm.models.placement import distribute, memory_limits
from qvlm.packing import read_origin
from qvlm.quantization import QuantizationConfig, QuantSpec
from qvlm.records import provenance
from qvlm.records.record import find_record, identify, require_writable
from qvlm.runtime import workers as processes

CHECKPOINT_FILES = (".safetensors", ".bin", ".json", ".model", ".tiktoken")
DATA_FILES = (".parquet", ".json", ".arrow", ".png", ".jpg", ".jpeg")
# What a packed checkpoint does not settle: which questions, how they are asked, and where.
_NOT_OF_THE_CHECKPOINT = (
    *("data", "evaluation", "tracking", "launcher", "kernel", "results_dir", "device", "threads"),
    *("force", "seed", "group", "max_memory"),
)


def check(config: RunConfig) -> dict[str, Any]:
    """Makes sure that a cell can start, and returns what identifies it: see `identity`.

    Raises:
        UserError: naming the option that is wrong and what it accepts.
    """
    check_options(config)
    return identity(config)


def check_options(config: RunConfig) -> None:
    """The part of `check` that neither reads nor fetches a checkpoint."""
    method = build_method(config.method)
    if config.stream and not getattr(method, "one_pass", True):
        raise not_streamed(method.name)
    prompting(config)
    find_device(config.device)
    if config.device == MAP:
        memory_limits(config.max_memory)
    if not config.full_precision:
        quantization_config(config)
    require_writable(config.runs_dir)
    if config.save_packed is not None:
        require_writable(Path(config.save_packed).parent)


def identity(config: RunConfig) -> dict[str, Any]:
    """What identifies a cell; fetches its checkpoint, and hashes it.

    Returns:
        `hash`, and what it was made from: `influences`, `code`, `files_hashed`.

    Raises:
        UserError: if a checkpoint is not there and cannot be fetched.
    """
    files = {"model": provenance.content_hash(checkpoint_folder(config), CHECKPOINT_FILES)}
    if config.model.vision_tower is not None and config.model.packed is None:
        tower = local_folder(config.model.vision_tower, "model.vision_tower")
        files["vision_tower"] = provenance.content_hash(tower, CHECKPOINT_FILES)
    if Path(config.data.source).is_dir():
        files["data"] = provenance.content_hash(Path(config.data.source), DATA_FILES)
    code, parts = code_version(config), influences(config)
    return {
        "hash": identify(parts, code, files),
        "influences": parts,
        "code": code,
        "files_hashed": files,
    }


def code_version(config: RunConfig) -> str:
    """The version of the code that a cell runs."""
    return provenance.code_version(method_file(config.method))


def adopt(config: RunConfig) -> RunConfig:
    """The cell that is meant: canonical, and what a packed checkpoint was quantized with.

    Raises:
        UserError: if the checkpoint does not say, or does not fit in the schema.
    """
    if config.model.packed is None:
        return canonical(config)
    folder = config.model.packed
    if config.save_packed is not None:
        raise UserError("save_packed: model.packed is packed already; accepted is null")
    try:
        saved = read_origin(folder)["config"]
        given = OmegaConf.merge(OmegaConf.structured(RunConfig), saved)
        origin = OmegaConf.to_object(given)
    except (KeyError, TypeError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.packed: {folder} is of another version ({reason})") from error
    assert isinstance(origin, RunConfig)
    return canonical(
        replace(
            origin,
            model=replace(origin.model, packed=folder),
            execution="packed",
            save_packed=None,
            stream=False,
            **{key: getattr(config, key) for key in _NOT_OF_THE_CHECKPOINT},
        )
    )


def not_streamed(method: str) -> UserError:
    """The error for a method that a stream cannot serve."""
    return UserError(
        f"stream: {method} looks at layers of the float model before it quantizes them, and a "
        "stream reads each of them once; accepted are methods that take block after block: rtn, "
        "awq, layerwise, qlora, zeroquant"
    )


def streamed(config: RunConfig) -> RunConfig:
    """The cell once its model is written: what is evaluated is the packed checkpoint."""
    model = replace(config.model, packed=config.save_packed)
    return replace(config, model=model, save_packed=None, stream=False)


def is_saved(config: RunConfig, identity: Mapping[str, Any]) -> bool:
    """Whether there is nothing to save, or just this cell's packed model is where it should be.

    Raises:
        UserError: if something else is.
    """
    if config.save_packed is None:
        return True
    folder = Path(config.save_packed)
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / "config.json").is_file():
        raise UserError(f"save_packed: {folder} holds other files; give a new or an empty folder")
    try:
        return bool(read_origin(folder)["hash"] == identity["hash"])
    except (UserError, KeyError):
        return False  # killed while it was written


def is_recorded(config: RunConfig, identity: Mapping[str, Any]) -> bool:
    """Whether nothing is left to compute: the record is whole, and so is what is to be saved."""
    saved = is_saved(config, identity)
    record, _ = find_record(record_path(config, identity), identity["hash"])
    return saved and (record is not None or config.only_written) and not config.force


def record_path(config: RunConfig, identity: Mapping[str, Any]) -> Path:
    """The folder of a cell's record."""
    names = [config.model.name, config.method_name, config.bits.label.lower()]
    if (execution := canonical(config).execution) != "simulated":
        names.append(execution)
    return config.runs_dir / "-".join([*names, identity["hash"][:8]])


def method_class(node: Mapping[str, Any]) -> Any:
    """What `method._target_` names.

    Raises:
        UserError: if it cannot be imported.
    """
    target = node["_target_"]
    try:
        return get_object(target)
    except Exception as error:  # anything can happen while a stranger's module is imported
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(
            f"method._target_: {target} cannot be imported ({reason}); give the import path of a "
            "class, and its folder as --config-dir or in PYTHONPATH"
        ) from error


def method_file(node: Mapping[str, Any]) -> Path:
    """The file in which a method is written."""
    return Path(inspect.getfile(method_class(node)))


def build_method(node: Mapping[str, Any]) -> Method:
    """Makes the method that `_target_` names from the parameters beside it.

    Raises:
        UserError: for a parameter that it does not take, lacks or refuses.
    """
    target = method_class(node)
    given = {key for key in node if key != "_target_"}
    parameters = inspect.signature(target).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for key in sorted(given - {p.name for p in parameters}):
            accepted = ", ".join(p.name for p in parameters) or "no parameters at all"
            raise UserError(f"unknown key method.{key}; {target.__name__} accepts {accepted}")
    try:
        method = instantiate(dict(node), _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        reason = str(cause or error).splitlines()[0]
        raise UserError(f"method: {target.__name__} refuses its parameters: {reason}") from error
    if not callable(getattr(method, "quantize", None)) or not hasattr(method, "name"):
        raise UserError(
            f"method._target_: {node['_target_']} is no method; a method has a name and "
            "quantize(walk)"
        )
    return method


def quantization_config(config: RunConfig) -> QuantizationConfig:
    """Which tensors are quantized how, for the bit widths of this cell.

    Raises:
        UserError: naming the option.
    """
    bits, quantizer = config.bits, config.quantizer
    assert bits.weights is not None
    assert bits.activations is not None
    specs = {}
    for part, width in (
        ("weight", bits.weights),
        ("language", bits.activations),
        ("vision", bits.activations),
    ):
        shape = getattr(quantizer, part)
        try:
            specs[part] = QuantSpec(
                width, shape.granularity, shape.group_size, quantizer.p, quantizer.ranges
            )
        except UserError as error:
            raise UserError(f"quantizer, {part}: {error}") from error
    try:
        return QuantizationConfig(**specs, vision_tower=quantizer.vision_tower)
    except UserError as error:
        raise UserError(f"quantizer: {error}") from error


def prompting(config: RunConfig) -> Prompting:
    """Prompt format and conversation template of the checkpoint."""
    try:
        return Prompting(config.model.prompt_format, config.model.conversation)
    except UserError as error:
        raise UserError(f"model: {error}") from error


def checkpoint_folder(config: RunConfig) -> Path:
    """Where the checkpoint is: an embedded miniature by name, a folder, or one from the hub.

    Raises:
        UserError: if there is none.
    """
    if config.model.packed is not None:
        return local_folder(config.model.packed, "model.packed")
    return embedded(config.model.path) or local_folder(config.model.path, "model.path")


def find_device(name: str) -> str:
    """Resolves "auto" for the first process, and refuses a device that is not here.

    Raises:
        UserError: naming the devices that are.
    """
    cards = torch.cuda.device_count()
    present = ["cpu", *(f"cuda:{index}" for index in range(cards)), *([MAP] if cards else [])]
    if name == "auto":
        name = "cuda" if cards else "cpu"
    if name not in present and (name != "cuda" or not cards):
        raise UserError(f"device: {name!r} is not here; accepted are auto, {', '.join(present)}")
    if processes.count() > 1 and name != "cpu":
        if name != "cuda":
            raise UserError(
                f"device: {name!r} is for one process; accepted with {processes.count()} are "
                "auto, cuda (a card for each) and cpu"
            )
        if processes.on_this_machine() > cards:
            raise UserError(
                f"device: {processes.on_this_machine()} processes need a card each, and {cards} "
                "are here; start fewer, or give device=cpu"
            )
    return "cuda:0" if name == "cuda" else name


def settle(config: RunConfig, device: str) -> None:
    """Seeds every generator, asks for deterministic kernels, silences the libraries' own bars."""
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
    datasets.disable_progress_bars()  # they show without a terminal too
    transformers.utils.logging.disable_progress_bar()


def keep_few_primitives() -> None:
    """Lets a process keep 16 of oneDNN's primitives, unless the environment says otherwise.

    oneDNN multiplies bf16 matrices on a CPU. It makes a primitive for every number of rows that it
    meets and keeps 1,024 of them, where a mixture of experts meets hundreds: a quarter of a GiB in
    one question. What that costs in time is in docs/LOG.md. To be called before the first product.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")


def load(config: RunConfig, device: str) -> LoadedModel:
    """Loads the model in floating point or packed; a streamed cell leaves out decoder layers.

    Raises:
        UserError: if a file of the checkpoint is missing, truncated or does not fit.
    """
    model = config.model
    loaded = load_model(
        checkpoint_folder(config),
        model.name,
        prompting(config),
        "cpu" if device == MAP else device,
        model.dtype,
        vision_tower=None if model.packed else model.vision_tower,
        image_size=model.image_size,
        image_fit=model.image_fit,
        expert_capacity=model.expert_capacity,
        meta_layers=config.stream,
    )
    if device == MAP:
        simulated = not config.full_precision and model.packed is None
        distribute(loaded.model, memory_limits(config.max_memory), to_be_quantized=simulated)
    return loaded


def load_questions(config: RunConfig) -> datasets.Dataset:
    """The problems to evaluate.

    Raises:
        UserError: if they cannot be had, or are not as many as were published.
    """
    data, limit = config.data, config.evaluation.limit
    questions = load_scienceqa(data.source, data.split, limit, data.seed)
    if data.published and data.split == "test" and limit is None:
        require_published(questions, data.source)
    return questions


def draw_calibration(config: RunConfig) -> tuple[list[dict[str, Any]], list[int]]:
    """Draws the calibration problems, without replacement, and their rows in the split.

    Raises:
        UserError: if the split has fewer.
    """
    data, calibration = config.data, config.calibration
    pool = open_scienceqa(data.source, calibration.split, data.seed)
    count = calibration.samples
    order = random.Random(calibration.seed).sample(range(len(pool)), len(pool))
    if calibration.images == "only":
        order = [row for row in order if pool.has_image[row]]
    if count > len(order):
        raise UserError(
            f"calibration.samples: {count} is more than split {calibration.split} has"
            + (
                f" with images; accepted are 1 to {len(order)}, or calibration.images=any"
                if calibration.images == "only"
                else f"; accepted are 1 to {len(order)}"
            )
        )
    rows = sorted(order[:count])
    return list(pool.take(rows)), rows

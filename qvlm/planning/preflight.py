"""Preflight: what cells would read, need and take, before anything heavy is done.

`preflight=true` prints this page instead of running the cells. It ends with one sentence if a cell
does not fit, which names an option that helps.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from shutil import disk_usage

import psutil
import torch

from qvlm.cell import inputs as prepare
from qvlm.cell.checks import check_options
from qvlm.cell.identity import Cell, code_version, resolve
from qvlm.cell.method import build_method
from qvlm.config.schema import MAP, RunConfig, influences
from qvlm.errors import UserError
from qvlm.markdown import table
from qvlm.models.load import embedded
from qvlm.planning import sources
from qvlm.planning.estimates import TOWER_BYTES, Shape, find_shape, memory
from qvlm.planning.footprint import GIB
from qvlm.planning.sources import Source
from qvlm.planning.timing import seconds
from qvlm.records.record import read_run
from qvlm.runtime import precision

NOTES = """\
Memory is what the device needs without Python and its libraries. Hours are those of the evaluation
if every answer is as long as evaluation.max_new_tokens allows. They come from timing two decoder
layers on this machine and leave out loading, the vision tower and the search of a method. Both are
estimates. "*": there is a record if the files have not changed, which is checked when the cell
runs."""


def preflight(configs: Sequence[RunConfig]) -> None:
    """Prints what cells will read, need and take.

    Args:
        configs: Configurations of the cells.

    Raises:
        UserError: If an option is wrong, a file or repository does not exist, or a cell does not
            fit in memory.
    """
    configs = [resolve(config) for config in configs]
    for config in configs:
        check_options(config)
    configs = [prepare.settle_evaluation(config) for config in configs]
    print(f"Preflight of {len(configs)} cells: nothing is run, downloaded or hashed.\n")
    devices = {config.device: prepare.find_device(config.device) for config in configs}
    for device in dict.fromkeys(["cpu", *devices.values()]):
        print(f"{_device_name(device)}: {_gib(_free(device))} GiB free")
    shapes = {repr(config.model): find_shape(config.model) for config in configs}
    found = _sources(configs, shapes)
    rows = [[s.owner, s.place, _gib(s.size), _gib(s.download), s.known] for s in found]
    header = ["read", "from", "GiB", "to download", "known from"]
    print(f"\n{table(header, rows, left=2)}\n")
    _check_disk(found)

    rows, total, refused = [], 0.0, []
    for config in configs:
        shape, device = shapes[repr(config.model)], devices[config.device]
        recorded, need, hours = _recorded(config), "?", "?"
        if shape is not None:
            need = _gib(memory(config, shape))
            refusal = "" if recorded else _refusal(config, shape, device)
            questions = sources.question_count(config)
            if refusal:
                refused.append(refusal)
            elif questions and not recorded:
                timed = "cuda:0" if device == MAP else device
                took = seconds(config, shape, timed, questions) / 3600
                total, hours = total + took, f"{took:.2g}"
        cell = [config.model.name, config.method_name, config.bits.label]
        rows.append([*cell, recorded or "no", need, "0" if recorded else hours])
    header = ["model", "method", "bits", "recorded", "memory, GiB", "hours"]
    print(f"{table(header, rows, left=4)}\n\n{NOTES}")
    slow = [precision.advice(config.model.dtype, devices[config.device]) for config in configs]
    for advice in dict.fromkeys(sentence for sentence in slow if sentence is not None):
        print(f"\n{advice}")
    if refused:
        others = f" ({len(refused)} cells do not fit)" if len(refused) > 1 else ""
        raise UserError(refused[0] + others)
    print(f"\nTo do: {sum(row[3] == 'no' for row in rows)} cells, about {total:.2g} hours.")


def _sources(configs: Sequence[RunConfig], shapes: dict[str, Shape | None]) -> list[Source]:
    """Returns what the cells read, without duplicates."""
    found: dict[tuple[str, str], Source] = {}
    for config in configs:
        model, shape = config.model, shapes[repr(config.model)]
        owner, place = f"model {model.name}", model.packed or model.path
        if (owner, place) not in found:
            # Published checkpoints are in half precision.
            estimate = 2 * (shape.parameters - shape.tower_parameters) if shape else None
            option = "model.packed" if model.packed else "model.path"
            found[owner, place] = sources.checkpoint(place, owner, option, estimate)
        tower = shape.tower if shape and not model.packed else None
        if tower and ("vision tower", tower) not in found:
            source = sources.checkpoint(tower, "vision tower", "model.vision_tower", TOWER_BYTES)
            found["vision tower", tower] = source
        if ("data", config.data.source) not in found:
            found["data", config.data.source] = sources.data(config)
    return list(found.values())


def _check_disk(found: Sequence[Source]) -> None:
    """Makes sure that the disk of each cache has room for what is downloaded to it.

    Raises:
        UserError: If it has not, with the way out.
    """
    wanted: dict[Path, float] = {}
    for source in found:
        if source.cache is not None and source.download:
            wanted[source.cache] = wanted.get(source.cache, 0) + source.download
    for cache, size in wanted.items():
        free = disk_usage(_existing(cache)).free
        print(f"disk of {cache}: {_gib(free)} GiB free, {_gib(size)} GiB to download\n")
        if size > free:
            raise UserError(
                f"{cache} has {_gib(free)} GiB free, and {_gib(size)} GiB would be downloaded; "
                "set HF_HOME to a folder on a larger disk, or set model.path=FOLDER"
            )


def _recorded(config: RunConfig) -> str:
    """Returns "yes", "yes*" if the files were not compared, or "" if there is no record."""
    if config.force:
        return ""
    other = config.model.vision_tower or config.model.packed
    small_enough_to_hash = not other and not Path(config.data.source).is_dir()
    if embedded(config.model.path) and small_enough_to_hash:
        record, _ = Cell.of(config).find_record()
        return "yes" if record else ""
    wanted = json.loads(json.dumps(influences(config))), code_version(config)
    for file in config.runs_dir.glob(f"{config.model.name}-{config.method_name}-*/run.json"):
        try:
            run = read_run(file.parent)
        except (OSError, ValueError, RecursionError):
            continue
        if (run.get("influences"), run.get("code")) == wanted:
            return "yes*"
    return ""


def _refusal(config: RunConfig, shape: Shape, device: str) -> str:
    """Returns why a cell does not fit and what would help, or "" if it fits."""
    need, loaded = (
        memory(config, shape),
        shape.parameters * getattr(torch, config.model.dtype).itemsize,
    )
    cell = f"{config.model.name} {config.method_name} {config.bits.label}"
    if need <= _space(config, device):
        if device == "cpu" or config.stream or loaded <= _free("cpu"):
            return ""
        return (
            f"{cell} needs {_gib(loaded)} GiB of main memory while it is loaded, of which "
            f"{_gib(_free('cpu'))} GiB are free; end other programs"
        )
    sentence = (
        f"{cell} needs about {_gib(need)} GiB and {_device_name(device)} has {_gib(_free(device))}"
    )
    for option, other in _alternatives(config, device):
        place = other.device if other.device in ("cpu", MAP) else device
        if memory(other, shape) <= _space(other, place):
            return f"{sentence}; {option} would fit"
    return f"{sentence}; no option makes it fit: use a larger device or a smaller model"


def _alternatives(config: RunConfig, device: str) -> Iterator[tuple[str, RunConfig]]:
    """Yields options and configurations that need less memory, the smallest change first."""
    batch = config.evaluation.batch_size
    while batch > 1:
        batch //= 2
        evaluation = replace(config.evaluation, batch_size=batch)
        yield f"evaluation.batch_size={batch}", replace(config, evaluation=evaluation)
    if config.model.dtype == "float32":
        half = replace(config, model=replace(config.model, dtype="bfloat16"))
        yield "model.dtype=bfloat16", half
        yield from ((f"model.dtype=bfloat16 {o}", c) for o, c in _alternatives(half, device))
    if device.startswith("cuda"):
        yield "device=map", replace(config, device=MAP)
    if not config.full_precision and config.model.packed is None:
        method = build_method(config.method)
        if not config.stream and device != MAP and getattr(method, "one_pass", True):
            folder = config.save_packed or "FOLDER"
            yield (
                f"stream=true save_packed={folder}",
                replace(config, stream=True, save_packed=folder),
            )
        packed = replace(config, model=replace(config.model, packed="FOLDER"))
        yield "model.packed=FOLDER, written elsewhere with save_packed=FOLDER,", packed
    if device != "cpu":
        yield "device=cpu", replace(config, device="cpu", max_memory=[])


def _space(config: RunConfig, device: str) -> float:
    """Returns the bytes that a cell may use.

    A cell on all GPUs may use main memory as well, unless it quantizes.
    """
    evaluated_only = config.full_precision or config.model.packed is not None
    return _free(device) + (_free("cpu") if device == MAP and evaluated_only else 0)


def _free(device: str) -> float:
    """Returns the free bytes of a device; "map" is all GPUs together."""
    if device in ("cpu", prepare.MPS):  # which share one memory
        return float(psutil.virtual_memory().available)
    if device == MAP:
        return sum(_free(f"cuda:{index}") for index in range(torch.cuda.device_count()))
    return float(torch.cuda.mem_get_info(device)[0])


def _device_name(device: str) -> str:
    cores = f"{psutil.cpu_count(logical=True)} cores"
    if device == MAP:
        return f"map ({torch.cuda.device_count()} GPUs)"
    name = cores if device in ("cpu", prepare.MPS) else torch.cuda.get_device_name(device)
    return f"{device} ({name})"


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _gib(size: float | None) -> str:
    return "?" if size is None else f"{size / GIB:.1f}"

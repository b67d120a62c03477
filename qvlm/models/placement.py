"""Placement of a model that is too large for one GPU: on all GPUs, and the rest in main memory.

accelerate computes the device map and moves the inputs of every layer to the layer's device. Layers
that are kept in main memory are copied to the first GPU for each call, which is slow. A decoder
layer with its experts, and a layer of the vision tower, is never divided. The layers are balanced
over the GPUs, so that each has memory left for activations and its part of the KV cache.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory, get_max_memory

from qvlm.errors import UserError
from qvlm.models.llava import Llava

FOR_WEIGHTS = 0.9  # share of a GPU's free memory

MemoryLimits = dict[int | str, int]
"""Bytes that the model may take of each device: the number of a GPU, or "cpu"."""


def memory_limits(sizes: Sequence[str]) -> MemoryLimits:
    """Returns how much memory a model may take of each GPU and of main memory.

    Args:
        sizes: Limits of the GPUs in order and then of main memory, such as "20GiB". A device
            without a size gives most of its free memory.

    Raises:
        UserError: If there are more sizes than devices, or a size cannot be read.
    """
    limits: MemoryLimits = {
        name: int(size * (1 if name == "cpu" else FOR_WEIGHTS))
        for name, size in get_max_memory().items()
    }
    if len(sizes) > len(limits):
        raise UserError(
            f"max_memory: {len(sizes)} sizes are too many. Give one for each of the "
            f"{len(limits) - 1} GPUs, in order, and one for main memory."
        )
    for name, size in zip(limits, sizes, strict=False):
        try:
            limits[name] = get_max_memory({name: size})[name]
        except ValueError as error:
            raise UserError(
                f"max_memory: {size!r} is not a size. Give sizes such as 20GiB or 500MiB."
            ) from error
    return limits


def distribute(
    model: Llava,
    limits: MemoryLimits,
    *,
    to_be_quantized: bool = False,
    folder: Path | None = None,
) -> None:
    """Moves the parts of a model to the devices that have memory for them.

    Args:
        model: Model in main memory.
        limits: Limits from `memory_limits`. Without a GPU the model computes in main memory.
        to_be_quantized: Whether the weights will be quantized. They then take float32, and all must
            be on GPUs, because a layer in main memory has no weight between two calls.
        folder: Folder for parts that have to stay on disk; None keeps no part there.

    Raises:
        UserError: If the model does not fit. It has not been moved then.
    """
    whole = sorted(model._no_split_modules)
    wide = {name: torch.float32 for name, _ in model.named_parameters()} if to_be_quantized else {}
    options: dict[str, Any] = {"no_split_module_classes": whole, "special_dtypes": wide}
    limits = get_balanced_memory(model, dict(limits), **options)
    device_map = infer_auto_device_map(model, limits, offload_buffers=True, **options)
    main = next((device for device in limits if device in device_map.values()), "cpu")
    gpus = [device for device in limits if isinstance(device, int)]
    away = [part for part, device in device_map.items() if device not in (main, *gpus)]
    if folder is None and "disk" in device_map.values():
        raise UserError(
            "device: map has too little memory for the whole model; "
            f"{_first(device_map, 'disk')} and what follows it is left over. Give more in "
            "max_memory, or take a machine with more memory."
        )
    if away and to_be_quantized:
        raise UserError(
            "device: map has too little GPU memory for all weights in float32, which quantization "
            f"needs; {away[0] or 'the model'} would stay in main memory. Quantize with device=cpu "
            "save_packed=FOLDER, and evaluate with device=map model.packed=FOLDER."
        )
    dispatch_model(
        model,
        device_map,
        main_device=main,
        offload_dir=folder,
        offload_buffers=True,
        skip_keys=sorted(model._skip_keys_device_placement),
        force_hooks=True,
    )


def _first(device_map: Mapping[str, int | str], wanted: str) -> str:
    part = next(part for part, device in device_map.items() if device == wanted)
    return part or "the first part"

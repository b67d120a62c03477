"""A model too large for one card: its layers on all cards, and what is left over in main memory.

accelerate computes the map and moves every layer's inputs to where the layer is; layers that are
kept in main memory visit the first card for each call, which is slow. A decoder layer, with its
experts, and a layer of the vision tower stay in one piece. The layers are spread evenly, so that
each card has room for activations and the KV cache of its own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory, get_max_memory

from qvlm.errors import UserError
from qvlm.models.llava import Llava

FOR_WEIGHTS = 0.9  # of what is free on a card

Room = dict[int | str, int]
"""Bytes that the model may take of each device: the number of a card, or "cpu"."""


def room(limits: Sequence[str]) -> Room:
    """What a model may take of each card and of main memory.

    Args:
        limits: for the cards in order and then main memory, such as "20GiB"; for a device that
            they do not reach to, it is most of what is free.

    Raises:
        UserError: for more limits than devices, or a size that cannot be read.
    """
    free: Room = get_max_memory()
    free = {name: int(size * (1 if name == "cpu" else FOR_WEIGHTS)) for name, size in free.items()}
    if len(limits) > len(free):
        raise UserError(
            f"max_memory: {len(limits)} sizes are too many; accepted is one for each of the "
            f"{len(free) - 1} cards, in order, and one for main memory"
        )
    for name, size in zip(free, limits, strict=False):
        try:
            free[name] = get_max_memory({name: size})[name]
        except ValueError as error:
            raise UserError(
                f"max_memory: {size!r} is no size; accepted are such as 20GiB or 500MiB"
            ) from error
    return free


def spread(
    model: Llava, space: Room, *, to_be_quantized: bool = False, folder: Path | None = None
) -> None:
    """Moves the parts of a model to where there is room for them.

    Args:
        model: in main memory.
        space: from `room`. With no card in it, the model computes in main memory.
        to_be_quantized: its weights will be in float32, and none may be kept in main memory: what
            is not on a card has no weight between two calls.
        folder: for what has to stay on the disk; None keeps nothing there.

    Raises:
        UserError: if the model does not fit; it has not been moved then.
    """
    whole = sorted(model._no_split_modules)
    wide = {name: torch.float32 for name, _ in model.named_parameters()} if to_be_quantized else {}
    sizes: dict[str, Any] = {"no_split_module_classes": whole, "special_dtypes": wide}
    space = get_balanced_memory(model, dict(space), **sizes)
    places = infer_auto_device_map(model, space, offload_buffers=True, **sizes)
    main = next((place for place in space if place in places.values()), "cpu")
    away = [part for part, place in places.items() if place not in (main, *_cards(space))]
    if folder is None and "disk" in places.values():
        raise UserError(
            f"device: map has no room for the whole model ({_first(places, 'disk')} and what comes "
            "after it is left over); give more in max_memory, or a machine with more memory"
        )
    if away and to_be_quantized:
        raise UserError(
            f"device: map has no room on the cards for all weights in float32 ({away[0]} would "
            "stay in main memory), which quantization needs; quantize with device=cpu "
            "save_packed=FOLDER, and evaluate with device=map model.packed=FOLDER"
        )
    dispatch_model(
        model,
        places,
        main_device=main,
        offload_dir=folder,
        offload_buffers=True,
        skip_keys=sorted(model._skip_keys_device_placement),
        force_hooks=True,
    )


def _cards(space: Room) -> list[int | str]:
    return [place for place in space if isinstance(place, int)]


def _first(places: Mapping[str, int | str], wanted: str) -> str:
    return next(part for part, place in places.items() if place == wanted)

"""Packed checkpoints: a packed model saved with its encoding, and loaded again.

This is the only module of `qvlm.models` that knows of quantization. `qvlm.packing` writes and reads
the packed layers; here the tokenizer, the image processor and the rest of the encoding are added.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qvlm.models.checkpoints.checkpoint import Checkpoint, read_image_processor
from qvlm.models.checkpoints.family import read_family_config
from qvlm.models.checkpoints.language_model import is_language_model, read_language_model
from qvlm.models.checkpoints.own import read_architecture
from qvlm.models.checkpoints.tokenizer import read_saved_tokenizer
from qvlm.models.loaded import LoadedModel
from qvlm.models.networks import Architecture, has_vision, network
from qvlm.packing import (
    ORIGIN,
    Origin,
    load_packed,
    read_origin,
    save_folder,
    save_packed,
    write_origin,
)
from qvlm.packing.saving import PROGRESS, UNFINISHED


def save_packed_model(loaded: LoadedModel, folder: Path, origin: Origin) -> None:
    """Writes a packed model with everything that `load_model` needs to use it.

    Args:
        loaded: Model with packed layers.
        folder: Folder that is made if need be. A packed checkpoint in it is replaced.
        origin: How the model was quantized.

    Raises:
        UserError: If the model has no packed layer, or the folder holds anything but a save.
        RunError: If the folder cannot be written. Then it is as it was before.
    """

    def fill(partial: Path) -> None:
        save_packed(loaded.model, partial)
        save_encoding(loaded, partial, origin)

    save_folder(folder, fill)


def save_encoding(loaded: LoadedModel, folder: Path, origin: Origin) -> None:
    """Writes what encodes texts and images, and then the origin, which marks a complete folder."""
    loaded.save_encoding(folder)
    files = sorted(set(os.listdir(folder)) - {ORIGIN, UNFINISHED, PROGRESS})
    write_origin(folder, replace(origin, files=files))


def load_packed_family(folder: Path, owner: str, dtype: torch.dtype) -> PreTrainedModel:
    """Loads the network of a family that `save_packed_model` wrote.

    Args:
        folder: Folder of the packed checkpoint.
        owner: Name of the checkpoint in messages.
        dtype: Type of the weights that are not packed.

    Raises:
        UserError: If a file is missing or damaged, or anything does not fit.
    """
    config = read_family_config(folder, owner)
    return load_packed(network(config), folder, config=config, dtype=dtype, trust_remote_code=False)


def load_packed_checkpoint(
    folder: Path,
    content: Mapping[str, Any],
    owner: str,
    dtype: torch.dtype,
    expert_capacity: str = "checkpoint",
) -> Checkpoint:
    """Loads a folder that `save_packed_model` wrote.

    Args:
        folder: Folder of the packed checkpoint.
        content: Content of its config.json.
        owner: Name of the checkpoint in messages.
        dtype: Type of the weights that are not packed.
        expert_capacity: "checkpoint" for the limit in config.json, or "unlimited".

    Raises:
        UserError: If a file is missing or damaged, or anything does not fit.
    """
    encoding = read_origin(folder).encoding
    architecture: Architecture
    if is_language_model(content):
        architecture = read_language_model(content, owner)
    else:
        architecture = read_architecture(content, owner, expert_capacity)
    kind = network(architecture)
    model = load_packed(kind, folder, config=architecture, dtype=dtype, trust_remote_code=False)
    return Checkpoint(
        model,
        read_saved_tokenizer(folder, encoding.begins_with_bos, owner),
        read_image_processor(folder, owner) if has_vision(architecture) else None,
        encoding.image_fit,
        encoding.image_text,
    )

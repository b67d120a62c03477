"""Checkpoints in our own format: transformers' files with our configuration class.

The miniatures are stored so. A packed checkpoint has the same files with packed weights, and
`qvlm.models.packed` loads it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from qvlm.data.prompts import IMAGE_TOKEN
from qvlm.errors import UserError, first_line
from qvlm.models.checkpoints.checkpoint import (
    Checkpoint,
    build_model,
    read_image_processor,
)
from qvlm.models.checkpoints.families import OWN_NAMES
from qvlm.models.checkpoints.tensors import find_tensors
from qvlm.models.checkpoints.tokenizer import read_saved_tokenizer
from qvlm.models.checkpoints.weights import Weights
from qvlm.models.llava import LlavaArchitecture
from qvlm.models.mixture import set_expert_capacity

FILES = ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json")


def load_own(
    folder: Path,
    content: Mapping[str, Any],
    owner: str,
    dtype: torch.dtype,
    expert_capacity: str = "checkpoint",
    meta_layers_for: str | None = None,
) -> Checkpoint:
    """Loads a checkpoint folder in our own format.

    Args:
        folder: Folder with `FILES`.
        content: Content of its config.json.
        owner: Name of the checkpoint in messages.
        dtype: Type of the weights.
        expert_capacity: "checkpoint" for the limit in config.json, or "unlimited".
        meta_layers_for: See `build_model`.

    Raises:
        UserError: If a file is missing or damaged, or anything does not fit.
    """
    for file in FILES:
        if not (folder / file).is_file():
            raise UserError(
                f"{owner}: {folder / file} is missing. A checkpoint folder holds "
                f"{', '.join(FILES)}."
            )
    architecture = read_architecture(content, owner, expert_capacity)
    sources = {"checkpoint": (Weights(folder, owner), OWN_NAMES)}
    tensors = find_tensors(architecture, sources, owner)
    return Checkpoint(
        build_model(architecture, tensors, dtype, meta_layers_for, owner),
        read_saved_tokenizer(folder, architecture.begins_with_bos, owner),
        read_image_processor(folder, owner),
        "crop",
        IMAGE_TOKEN,
        tensors if meta_layers_for is not None else None,
    )


def read_architecture(
    content: Mapping[str, Any], owner: str, expert_capacity: str = "checkpoint"
) -> LlavaArchitecture:
    """Reads a config.json that transformers wrote for our configuration class.

    Raises:
        UserError: If it does not describe a model.
    """
    try:
        architecture = LlavaArchitecture.from_dict(dict(content))
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        raise UserError(
            f"{owner}: config.json does not describe a model: {first_line(error)}"
        ) from error
    layer, count = architecture.vision_feature_layer, architecture.vision_config.num_hidden_layers
    if not isinstance(layer, int) or not -count - 1 <= layer <= count:
        raise UserError(
            f"{owner}: config.json: vision_feature_layer={layer!r} is not a layer of its tower. "
            f"Give a whole number from {-count - 1} to {count}."
        )
    set_expert_capacity(architecture.text_config, expert_capacity)
    return architecture

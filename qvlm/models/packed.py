"""Packed checkpoints: a packed model saved with its encoding, and loaded again.

This is the only module of `qvlm.models` that knows of quantization. `qvlm.packing` writes and reads
the packed layers; here the tokenizer, the image processor and the rest of the encoding are added.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qvlm.errors import UserError
from qvlm.models.checkpoints.checkpoint import Checkpoint, read_image_processor
from qvlm.models.checkpoints.own import read_architecture
from qvlm.models.checkpoints.tokenizer import read_saved_tokenizer
from qvlm.models.llava import Llava
from qvlm.models.loaded import LoadedModel
from qvlm.packing import ORIGIN, load_packed, read_origin, save_packed, write_origin


def save_packed_model(loaded: LoadedModel, folder: Path, origin: Mapping[str, Any]) -> None:
    """Writes a packed model with everything that `load_model` needs to use it.

    Args:
        loaded: Model with packed layers.
        folder: Folder that is made if need be. A packed checkpoint in it is replaced.
        origin: Configuration and identity of the cell that quantized the model.

    Raises:
        UserError: If the model has no packed layer, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ORIGIN).unlink(missing_ok=True)
        save_packed(loaded.model, folder)
        save_encoding(loaded, folder, origin)
    except OSError as error:
        raise UserError(f"save_packed: {folder} cannot be written ({error}).") from error


def save_encoding(loaded: LoadedModel, folder: Path, origin: Mapping[str, Any]) -> None:
    """Writes tokenizer and image processor, and then the origin, which marks a complete folder."""
    loaded.tokenizer.save_pretrained(folder)
    loaded.image_processor.save_pretrained(folder)
    encoding = {
        "image_fit": loaded.image_fit,
        "image_text": loaded.image_text,
        "begins_with_bos": loaded.begins_with_bos,
    }
    write_origin(folder, {**origin, "encoding": encoding})


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
    encoding = _read_encoding(folder)
    architecture = read_architecture(content, owner, expert_capacity)
    model = load_packed(Llava, folder, config=architecture, dtype=dtype, trust_remote_code=False)
    return Checkpoint(
        model,
        read_saved_tokenizer(folder, encoding["begins_with_bos"], owner),
        read_image_processor(folder, owner),
        encoding["image_fit"],
        encoding["image_text"],
    )


def _read_encoding(folder: Path) -> dict[str, Any]:
    """Reads how texts and images are encoded.

    Raises:
        UserError: If the folder does not say so completely.
    """
    encoding = read_origin(folder).get("encoding")
    types = {"image_fit": str, "image_text": str, "begins_with_bos": bool}
    given = encoding if isinstance(encoding, dict) else {}
    wrong = [key for key, kind in types.items() if not isinstance(given.get(key), kind)]
    if wrong:
        raise UserError(
            f"model.packed: {folder / ORIGIN} has no valid encoding.{wrong[0]}. Give a folder that "
            "python run.py save_packed=FOLDER wrote."
        )
    return given

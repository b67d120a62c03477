"""A checkpoint folder becomes a `LoadedModel`, whatever its format.

A folder is in our own format, as the miniatures are, packed, or as its authors published it.
Loading ends with a check that its parts belong together, because a wrong prompt or image size gives
plausible answers, 40 % accuracy and no other sign.
"""

from pathlib import Path

import torch
from transformers import GenerationConfig

from qvlm.data.prompts import Prompting
from qvlm.errors import UserError
from qvlm.models.checkpoints.checkpoint import Checkpoint
from qvlm.models.checkpoints.families import read_config
from qvlm.models.checkpoints.hub import local_folder
from qvlm.models.checkpoints.language_model import is_language_model, load_language_model
from qvlm.models.checkpoints.original import carries_its_tower, load_original
from qvlm.models.checkpoints.own import load_own
from qvlm.models.float64 import compute_in_float64
from qvlm.models.llava import LlavaArchitecture
from qvlm.models.loaded import LoadedModel
from qvlm.models.packed import load_packed_checkpoint
from qvlm.packing import is_packed

MINIATURES = Path(__file__).parent / "miniature"


def embedded(path: str | Path) -> Path | None:
    """Returns the folder of the embedded miniature of this name, or None if there is none."""
    folder = MINIATURES / path
    return folder if folder.parent == MINIATURES and folder.is_dir() else None


def load_model(
    path: str | Path,
    name: str,
    prompting: Prompting | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    *,
    vision_tower: str | None = None,
    image_size: int | None = None,
    image_fit: str | None = None,
    expert_capacity: str = "checkpoint",
    meta_layers: bool = False,
) -> LoadedModel:
    """Loads a checkpoint.

    Args:
        path: Folder, name of an embedded miniature, or repository on the hub.
        name: Name of the model in records and tables.
        prompting: Prompt format and conversation template; None is QCM-LEA with vicuna_v1.
        device: Device of the weights.
        dtype: Floating-point type of the weights, in which the model computes.
        vision_tower: Folder or repository of the tower, for checkpoints whose config.json names
            one; None takes that one.
        image_size: Expected side of the tower's input in pixels; None accepts any.
        image_fit: "crop" or "pad"; None takes what the checkpoint states.
        expert_capacity: "checkpoint" for the limit in config.json, or "unlimited".
        meta_layers: Whether the decoder layers stay on the meta device, to be materialized one by
            one.

    Raises:
        UserError: If the folder or a file in it is missing, truncated or does not fit, or its parts
            do not belong together.
    """
    folder = embedded(path) or local_folder(path, "model.path")
    owner = f"model {name}"
    read = _read(
        folder,
        owner,
        getattr(torch, dtype),
        vision_tower,
        expert_capacity,
        device if meta_layers else None,
    )
    tokenizer = read.text.tokenizer
    read.model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if dtype == "float64":
        compute_in_float64(read.model)
    if not meta_layers:  # a meta device's weights cannot be moved, and the others are in place
        read.model.to(device).eval()
    loaded = LoadedModel(
        read.model,
        tokenizer,
        read.image_processor,
        prompting or Prompting(),
        name,
        image_fit or read.image_fit,
        read.image_text,
        read.text.begins_with_bos,
        read.tensors,
    )
    _check_together(loaded, image_size, owner)
    return loaded


def _read(
    folder: Path,
    owner: str,
    dtype: torch.dtype,
    vision_tower: str | None,
    expert_capacity: str,
    meta_layers_for: str | None,
) -> Checkpoint:
    """Reads a folder with the loader of its format."""
    content = read_config(folder, owner)
    if is_packed(content):
        return load_packed_checkpoint(folder, content, owner, dtype, expert_capacity)
    if is_language_model(content):
        return load_language_model(folder, content, owner, dtype, meta_layers_for)
    if content.get("model_type") == LlavaArchitecture.model_type:
        if vision_tower is not None:
            raise carries_its_tower(owner)
        return load_own(folder, content, owner, dtype, expert_capacity, meta_layers_for)
    return load_original(
        folder, content, owner, dtype, vision_tower, expert_capacity, meta_layers_for
    )


def _check_together(loaded: LoadedModel, image_size: int | None, owner: str) -> None:
    """Refuses prompting or an image size that the model was not tuned with."""
    end = loaded.tokenizer.eos_token
    if loaded.prompting.end != end:
        raise UserError(
            f"model.conversation: {loaded.prompting.conversation} ends a turn with "
            f"{loaded.prompting.end}, but the tokenizer of {owner} ends it with {end}. Give the "
            "template that the checkpoint was tuned with."
        )
    if loaded.image_processor is None:
        if image_size is not None:
            raise UserError(
                f"model.image_size: {owner} has no vision tower. Set model.image_size=null."
            )
        return
    side = loaded.image_size
    if image_size not in (None, side):
        raise UserError(
            f"model.image_size: {image_size} is not the input size of the vision tower of {owner}. "
            f"Set model.image_size={side} or null."
        )
    crop = loaded.image_processor.crop_size
    if (crop["height"], crop["width"]) != (side, side):
        raise UserError(
            f"{owner}: preprocessor_config.json cuts images to {crop['height']} x {crop['width']}, "
            f"but the vision tower takes {side} x {side}. Give the preprocessor_config.json that "
            "belongs to the tower."
        )

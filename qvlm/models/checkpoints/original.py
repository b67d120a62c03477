"""Checkpoints as their authors published them, read into our classes without any of their code.

config.json gives an architecture and a list of renamings (`qvlm.models.checkpoints.families`), and
`find_tensors` matches tensors and parameters. LLaVA's own format neither describes its vision tower
nor has to carry it: the tower comes from the repository that config.json names, or from a copy.
"""

from pathlib import Path
from typing import Any

import torch

from qvlm.data.prompts import IMAGE_TOKEN
from qvlm.errors import UserError
from qvlm.models.checkpoints.checkpoint import Checkpoint, build_model, read_image_processor
from qvlm.models.checkpoints.families import (
    TOWER_NAMES,
    Blueprint,
    read_blueprint,
    read_config,
    vision_config,
)
from qvlm.models.checkpoints.hub import local_folder
from qvlm.models.checkpoints.tensors import find_tensors, has_tower, require_same_tower
from qvlm.models.checkpoints.tokenizer import TextEncoding, load_tokenizer
from qvlm.models.checkpoints.weights import INDEX_SUFFIX, STEMS, Weights
from qvlm.models.mixture import set_expert_capacity


def load_original(
    folder: Path,
    content: dict[str, Any],
    owner: str,
    dtype: torch.dtype,
    vision_tower: str | None = None,
    expert_capacity: str = "checkpoint",
    meta_layers_for: str | None = None,
) -> Checkpoint:
    """Loads a checkpoint folder of one of the families.

    Args:
        folder: Folder of the checkpoint.
        content: Content of its config.json.
        owner: Name of the checkpoint in messages.
        dtype: Type of the weights.
        vision_tower: Folder or repository of the tower; None takes the one in config.json. Weights
            in it must equal those of a tower that the checkpoint carries.
        expert_capacity: "checkpoint" for the limit in config.json, or "unlimited".
        meta_layers_for: See `build_model`.

    Raises:
        UserError: If a file is missing or damaged, or anything does not fit.
    """
    blueprint = read_blueprint(content, owner)
    text = load_tokenizer(folder, content, owner)
    _check_tokens(blueprint, text, owner)
    set_expert_capacity(blueprint.text, expert_capacity)
    weights = Weights(folder, owner)
    sources = {"checkpoint": (weights, blueprint.renamings)}
    vision, tower = blueprint.vision, folder
    if vision is None:
        carried = has_tower(weights, blueprint.renamings)
        assert blueprint.vision_tower is not None
        tower = local_folder(
            vision_tower or blueprint.vision_tower, "model.vision_tower", weights=not carried
        )
        vision = vision_config(read_config(tower, f"{owner}, vision tower"))
        if not carried:
            sources["tower"] = (Weights(tower, f"{owner}, vision tower"), TOWER_NAMES)
    elif vision_tower is not None:
        raise carries_its_tower(owner)
    architecture = blueprint.architecture(vision, owner)
    tensors = find_tensors(architecture, sources, owner)
    if vision_tower is not None and "tower" not in sources and _has_weights(tower):
        require_same_tower(tensors, Weights(tower, f"{owner}, vision tower"), owner)
    return Checkpoint(
        build_model(architecture, tensors, dtype, meta_layers_for, owner),
        text,
        read_image_processor(tower, owner),
        blueprint.image_fit,
        blueprint.image_text,
        tensors if meta_layers_for is not None else None,
    )


def carries_its_tower(owner: str) -> UserError:
    """Returns the error for a tower that is given to a checkpoint with its own."""
    return UserError(
        f"model.vision_tower: {owner} carries its own vision tower. Set model.vision_tower=null."
    )


def _has_weights(folder: Path) -> bool:
    return any((folder / (stem + end)).is_file() for stem in STEMS for end in ("", INDEX_SUFFIX))


def _check_tokens(blueprint: Blueprint, text: TextEncoding, owner: str) -> None:
    """Refuses a tokenizer that does not belong to the weights."""
    tokenizer, rows = text.tokenizer, blueprint.text.vocab_size
    if len(tokenizer) > rows:
        raise UserError(
            f"{owner}: the tokenizer has {len(tokenizer)} tokens, but config.json has a vocabulary "
            f"of {rows}. Give the tokenizer that belongs to the weights."
        )
    known = tokenizer.get_vocab()
    if blueprint.image_token_id is not None and known.get(IMAGE_TOKEN) != blueprint.image_token_id:
        raise UserError(
            f"{owner}: config.json puts {IMAGE_TOKEN} at {blueprint.image_token_id}, the tokenizer "
            f"at {known.get(IMAGE_TOKEN)}. Give the tokenizer that belongs to the weights."
        )
    for token in blueprint.image_text.replace(IMAGE_TOKEN, " ").split():
        if token not in known:
            raise UserError(
                f"{owner}: config.json wraps images in {token}, which the tokenizer does not know. "
                "Give the added_tokens.json that belongs to it."
            )

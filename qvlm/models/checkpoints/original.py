"""Checkpoints as their authors published them, read into our classes without any code of theirs.

config.json gives an architecture and a list of renamings (`qvlm.models.families`). Then every
tensor must have a place, every place a tensor, and every shape must fit. The single exception is
what older libraries saved although it follows from the configuration, rotary frequencies and
position numbers: those are compared.

LLaVA's own format does not describe its vision tower, and need not carry it: that comes from the
repository that config.json names, or from a copy of it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import CLIPImageProcessorPil

from qvlm.errors import UserError
from qvlm.models.checkpoints.families import (
    TOWER_NAMES,
    Blueprint,
    Renamings,
    read_blueprint,
    read_config,
    rename,
    split,
    vision_config,
)
from qvlm.models.meta import hollow
from qvlm.models.checkpoints.hub import local_folder
from qvlm.models.llava import Llava, LlavaArchitecture
from qvlm.models.checkpoints.tokenizer import TextEncoding, load_tokenizer
from qvlm.models.checkpoints.weights import Weights
from qvlm.data.prompts import IMAGE_TOKEN

_FOLLOWING = ("rotary_emb.inv_freq", "embeddings.position_ids")
_TOWER = "model.vision_tower."


@dataclass(frozen=True)
class Original:
    """A checkpoint, read.

    Attributes:
        image_fit: how an image becomes square, "crop" or "pad".
        image_text: what stands for an image in a prompt, around `<image>`.
        tensors: of a hollow model, to fill its layers with.
    """

    model: Llava
    text: TextEncoding
    image_processor: CLIPImageProcessorPil
    image_fit: str
    image_text: str
    tensors: "Tensors | None" = None


class Share(NamedTuple):
    """Where a tensor is: one of `of` equal parts of the rows of a tensor in a checkpoint."""

    weights: Weights
    name: str
    part: int = 0
    of: int = 1


class Tensors(Mapping[str, Tensor]):
    """The tensors of a model by the names that they have in it, each read when it is asked for."""

    def __init__(self, places: Mapping[str, Share]) -> None:
        self._places = places

    def __getitem__(self, place: str) -> Tensor:
        share = self._places[place]
        return share.weights[share.name].chunk(share.of)[share.part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def close(self) -> None:
        """See `Weights.close`."""
        for share in self._places.values():
            share.weights.close()


def load_original(
    folder: Path,
    content: dict[str, Any],
    owner: str,
    dtype: torch.dtype,
    vision_tower: str | None = None,
    expert_capacity: str = "checkpoint",
    hollow_on: str | None = None,
) -> Original:
    """Loads a checkpoint folder of one of the families.

    Args:
        content: its config.json.
        owner: what messages call the checkpoint.
        vision_tower: folder or repository of the tower; None is what config.json names.
        expert_capacity: "checkpoint", what config.json states, or "unlimited".
        hollow_on: a device to load all but the decoder layers on; None loads them too.

    Raises:
        UserError: if a file is missing or damaged, or anything does not fit.
    """
    blueprint = read_blueprint(content, owner)
    text = load_tokenizer(folder, content, owner)
    _check_tokens(blueprint, text, owner)
    if expert_capacity == "unlimited" and hasattr(blueprint.text, "capacity_factor"):
        blueprint.text.capacity_factor = None
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
        raise UserError(f"model.vision_tower: {owner} carries its own; accepted is null")
    architecture = blueprint.architecture(vision, owner)
    tensors = find_tensors(architecture, sources, owner)
    how = _image_processor(tower, owner), blueprint.image_fit, blueprint.image_text
    if hollow_on is not None:
        model = hollow(architecture, tensors, dtype, hollow_on)
        return Original(model, text, *how, tensors)
    return Original(_build(architecture, tensors, dtype, owner), text, *how)


def _check_tokens(blueprint: Blueprint, text: TextEncoding, owner: str) -> None:
    """Refuses a tokenizer that does not belong to the weights."""
    tokenizer, rows = text.tokenizer, blueprint.text.vocab_size
    if len(tokenizer) > rows:
        raise UserError(
            f"{owner}: the tokenizer has {len(tokenizer)} tokens but config.json a vocabulary of "
            f"{rows}; give the tokenizer that belongs to the weights"
        )
    known = tokenizer.get_vocab()
    if blueprint.image_token_id is not None and known.get(IMAGE_TOKEN) != blueprint.image_token_id:
        raise UserError(
            f"{owner}: config.json puts {IMAGE_TOKEN} at {blueprint.image_token_id}, the tokenizer "
            f"at {known.get(IMAGE_TOKEN)}; give the tokenizer that belongs to the weights"
        )
    for token in blueprint.image_text.replace(IMAGE_TOKEN, " ").split():
        if token not in known:
            raise UserError(
                f"{owner}: config.json wraps images in {token}, which the tokenizer does not know; "
                "give the added_tokens.json that belongs to it"
            )


def _image_processor(folder: Path, owner: str) -> CLIPImageProcessorPil:
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        raise UserError(f"{owner}: {file} is missing, which says how images are resized")
    try:
        return CLIPImageProcessorPil.from_pretrained(folder)
    except (OSError, ValueError, TypeError, json.JSONDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{owner}: {file} does not load: {reason}") from error


def find_tensors(
    architecture: LlavaArchitecture,
    sources: Mapping[str, tuple[Weights, Renamings]],
    owner: str,
) -> Tensors:
    """The tensors of a model in its checkpoint and, where that lacks them, in its tower.

    Args:
        sources: "checkpoint", and "tower" if there is one.

    Raises:
        UserError: for a tensor that is missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        empty = Llava(architecture)
    places = empty.state_dict()
    if architecture.tie_word_embeddings:
        del places["lm_head.weight"]
    found: dict[str, Share] = {}
    for source, (weights, renamings) in sources.items():
        for name in weights:
            place = rename(name, renamings)
            parts = split(place)
            if source == "tower" and (not place.startswith(_TOWER) or place in found):
                continue  # a CLIP repository holds a text model as well
            if place.endswith(_FOLLOWING):
                _compare(weights, name, architecture, owner)
            elif all(part in places for part in parts):
                rows, *columns = places[parts[0]].shape
                _fit(weights, name, (len(parts) * rows, *columns), owner)
                for index, part in enumerate(parts):
                    found[part] = Share(weights, name, index, len(parts))
            elif place != "lm_head.weight":
                raise UserError(
                    f"{owner}: {weights.file(name)} has tensor {name}, for which the architecture "
                    "in config.json has no place"
                )
    missing = [place for place in places if place not in found]
    if missing:
        raise UserError(
            f"{owner}: {len(missing)} tensors are missing, first the one for {missing[0]}; give a "
            "complete copy of the checkpoint"
        )
    return Tensors(found)


def _build(
    architecture: LlavaArchitecture, tensors: Tensors, dtype: torch.dtype, owner: str
) -> Llava:
    # Nothing is initialised at random: the state is complete, and this only fills buffers.
    model, report = Llava.from_pretrained(
        None, config=architecture, state_dict=dict(tensors), dtype=dtype, output_loading_info=True
    )
    left = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    if left:
        raise UserError(f"{owner}: not everything was loaded: {left}")
    return model


def has_tower(weights: Weights, renamings: Renamings) -> bool:
    """Whether a checkpoint carries its vision tower."""
    return any(rename(name, renamings).startswith(_TOWER) for name in weights)


def _fit(weights: Weights, name: str, expected: tuple[int, ...], owner: str) -> None:
    if weights.shape(name) != expected:
        raise UserError(
            f"{owner}: tensor {name} in {weights.file(name)} has shape {weights.shape(name)}, but "
            f"config.json asks for {expected}"
        )


def _compare(weights: Weights, name: str, architecture: LlavaArchitecture, owner: str) -> None:
    """Holds a tensor that follows from config.json to what follows from it."""
    saved = weights[name].flatten().double()
    if name.endswith("position_ids"):
        expected = torch.arange(len(saved)).double()
    else:
        text = architecture.text_config
        rope = text.rope_parameters
        width = text.hidden_size // text.num_attention_heads
        width = int(width * rope.get("partial_rotary_factor", 1.0))
        steps = torch.arange(0, width, 2).double() / width
        expected = rope["rope_theta"] ** -steps
    # Older checkpoints hold frequencies in half precision.
    if saved.shape != expected.shape or not torch.allclose(saved, expected, rtol=2e-3, atol=1e-6):
        raise UserError(
            f"{owner}: {name} in {weights.file(name)} is not what follows from config.json; give "
            "the config.json that belongs to the weights"
        )

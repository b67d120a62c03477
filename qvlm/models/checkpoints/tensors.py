"""The tensors of a model in a checkpoint's files: found, renamed and compared, read when needed.

Every tensor of a checkpoint must have a parameter, every parameter a tensor, and every shape must
fit. Older libraries also saved rotary frequencies and position numbers, although they follow from
the configuration. These are compared with what follows from it.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qvlm.errors import UserError, first_line
from qvlm.models.checkpoints.families import TOWER_NAMES, Renamings, rename, split
from qvlm.models.checkpoints.weights import Weights
from qvlm.models.llava import Llava
from qvlm.models.networks import Architecture, LanguageModel, network

_COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")
_TOWER = "model.vision_tower."
_HEAD = "lm_head.weight"
_EMBEDDINGS = "embed_tokens.weight"


class TensorSlice(NamedTuple):
    """Where a parameter is stored: one of `of` equal parts of the rows of a checkpoint's tensor."""

    weights: Weights
    name: str
    part: int = 0
    of: int = 1


class Tensors(Mapping[str, Tensor]):
    """The tensors of a model by the names of its parameters, each read when it is asked for."""

    def __init__(self, slices: Mapping[str, TensorSlice]) -> None:
        self._slices = slices

    def __getitem__(self, name: str) -> Tensor:
        stored = self._slices[name]
        return stored.weights[stored.name].chunk(stored.of)[stored.part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def __len__(self) -> int:
        return len(self._slices)

    def close(self) -> None:
        """Closes the files: see `Weights.close`."""
        for stored in self._slices.values():
            stored.weights.close()


def find_tensors(
    architecture: Architecture,
    sources: Mapping[str, tuple[Weights, Renamings]],
    owner: str,
) -> Tensors:
    """Finds the tensors of a model in its checkpoint and, where that lacks them, in its tower.

    Args:
        architecture: Configuration of the model.
        sources: Weights and renamings of the "checkpoint" and, if there is one, of the "tower".
        owner: Name of the checkpoint in messages.

    Raises:
        UserError: If a tensor is missing, unexpected or of another shape, or config.json ties an
            output head to embeddings that differ from it.
    """
    held = sum(len(weights) for weights, _ in sources.values())
    empty = _empty_model(architecture, held, owner)
    parameters = empty.state_dict()
    if architecture.tie_word_embeddings:
        del parameters[_HEAD]
    found: dict[str, TensorSlice] = {}
    tied_head: TensorSlice | None = None
    for source, (weights, renamings) in sources.items():
        for name in weights:
            renamed = rename(name, renamings)
            parts = split(renamed)
            if source == "tower" and (not renamed.startswith(_TOWER) or renamed in found):
                continue  # a CLIP repository also holds a text model
            if renamed.endswith(_COMPUTED):
                _compare(weights, name, architecture, owner)
            elif all(part in parameters for part in parts):
                rows, *columns = parameters[parts[0]].shape
                _check_shape(weights, name, (len(parts) * rows, *columns), owner)
                for index, part in enumerate(parts):
                    found[part] = TensorSlice(weights, name, index, len(parts))
            elif renamed == _HEAD:
                tied_head = TensorSlice(weights, name)
            else:
                raise UserError(
                    f"{owner}: {weights.file(name)} has tensor {name}, for which the architecture "
                    "in config.json has no place. Give the config.json that belongs to the weights."
                )
    missing = [name for name in parameters if name not in found]
    if missing:
        raise UserError(
            f"{owner}: {len(missing)} tensors are missing, first the one for {missing[0]}. Give a "
            "complete copy of the checkpoint."
        )
    tensors = Tensors(found)
    if tied_head is not None:
        _require_tied(tied_head, tensors, owner)
    return tensors


def _empty_model(architecture: Architecture, held: int, owner: str) -> Llava | LanguageModel:
    """Builds a model on the meta device.

    Args:
        architecture: Configuration of the model.
        held: Number of tensors that the weights have.
        owner: Name of the checkpoint in messages.

    Raises:
        UserError: If no model can be built from the configuration, or it has more layers than the
            weights have tensors. Building a layer takes time and memory even on the meta device.
    """
    try:
        parts = [architecture.get_text_config(), getattr(architecture, "vision_config", None)]
        layers = sum(part.num_hidden_layers for part in parts if part is not None)
        if layers > held:
            raise ValueError(f"it names {layers} layers, but the weights have {held} tensors")
        with torch.device("meta"):
            return network(architecture)(architecture)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise UserError(
            f"{owner}: config.json does not describe the model of these weights: {first_line(e)}. "
            "Give the config.json that belongs to them."
        ) from e


def has_tower(weights: Weights, renamings: Renamings) -> bool:
    """Returns whether a checkpoint carries its vision tower."""
    return any(rename(name, renamings).startswith(_TOWER) for name in weights)


def require_same_tower(tensors: Tensors, given: Weights, owner: str) -> None:
    """Makes sure that a given vision tower is the one that a checkpoint carries.

    Args:
        tensors: Tensors of the model.
        given: Weights of the tower's repository. They are compared in the checkpoint's precision.
        owner: Name of the checkpoint in messages.

    Raises:
        UserError: If a tensor differs, or the given tower lacks it.
    """
    names = {rename(name, TOWER_NAMES): name for name in given}
    for name in tensors:
        if not name.startswith(_TOWER):
            continue
        carried = tensors[name]
        if name not in names or not torch.equal(given[names[name]].to(carried.dtype), carried):
            folder = given.file(next(iter(given))).parent
            raise UserError(
                f"model.vision_tower: {owner} carries its own vision tower, and the weights in "
                f"{folder} differ from it, first in {name}. Leave model.vision_tower out, or give "
                "a folder with config.json and preprocessor_config.json alone."
            )


def _require_tied(head: TensorSlice, tensors: Tensors, owner: str) -> None:
    """Refuses an output head that differs from the embeddings that config.json ties it to."""
    weights, name = head.weights, head.name
    embeddings = next(tensors[key] for key in tensors if key.endswith(_EMBEDDINGS))
    _check_shape(weights, name, tuple(embeddings.shape), owner)
    if not torch.equal(weights[name].to(embeddings.dtype), embeddings):
        raise UserError(
            f"{owner}: {weights.file(name)} has an output head of its own, {name}, but config.json "
            "ties the head to the embeddings. Set tie_word_embeddings=false in it."
        )


def _check_shape(weights: Weights, name: str, expected: tuple[int, ...], owner: str) -> None:
    if weights.shape(name) != expected:
        raise UserError(
            f"{owner}: tensor {name} in {weights.file(name)} has shape {weights.shape(name)}, but "
            f"config.json asks for {expected}. Give the config.json that belongs to the weights."
        )


def _compare(weights: Weights, name: str, architecture: Architecture, owner: str) -> None:
    """Compares a tensor that follows from config.json with what follows from it."""
    saved = weights[name].flatten().double()
    if name.endswith("position_ids"):
        expected = torch.arange(len(saved)).double()
    else:
        text = architecture.get_text_config()
        rope = text.rope_parameters
        width = text.hidden_size // text.num_attention_heads
        width = int(width * rope.get("partial_rotary_factor", 1.0))
        steps = torch.arange(0, width, 2).double() / width
        expected = rope["rope_theta"] ** -steps
    # Older checkpoints hold frequencies in half precision.
    if saved.shape != expected.shape or not torch.allclose(saved, expected, rtol=2e-3, atol=1e-6):
        raise UserError(
            f"{owner}: {name} in {weights.file(name)} is not what follows from config.json. Give "
            "the config.json that belongs to the weights."
        )

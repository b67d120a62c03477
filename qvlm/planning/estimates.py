"""Predicts how much memory a cell takes, from the shape of its model.

`qvlm.planning.footprint` predicts what answering takes. This module adds what only cells need:

- Simulated execution, and packing until it is done, keep every quantized weight in float32,
  whatever the dtype of the model. Only a model that was packed before is small from the start.
- Calibration holds the hidden states of the calibration set beside the weights.
- Streaming holds one decoder layer at a time.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import CLIPVisionConfig

from qvlm.cell.inputs import answer_length
from qvlm.config.schema import ModelConfig, RunConfig
from qvlm.data.prompts import CHAT
from qvlm.errors import UserError
from qvlm.models.architectures import KNOWN, clip_tower
from qvlm.models.checkpoints.families import Blueprint, read_blueprint, read_config, vision_config
from qvlm.models.checkpoints.language_model import is_language_model, read_language_model
from qvlm.models.checkpoints.tensors import has_tower
from qvlm.models.checkpoints.weights import Weights
from qvlm.models.llava import Llava, LlavaArchitecture
from qvlm.models.meta import meta_model
from qvlm.models.networks import (
    Architecture,
    LanguageModel,
    decoder_layers_name,
    has_vision,
    image_tokens,
)
from qvlm.planning.footprint import FULL, TEXT_TOKENS, Need, Variant, predict
from qvlm.planning.sources import local_copy
from qvlm.quantization import expected_layers
from qvlm.quantization.block import MAX_TOKENS
from qvlm.quantization.targets import quantizable

MARGIN = 1.1  # for scales, temporary copies and fragmentation
FLOAT32 = 4  # bytes
TOWER_BYTES = FLOAT32 * 428_000_000  # repository of CLIP ViT-L/14: float32, text model included


@dataclass(frozen=True, eq=False)
class Shape:
    """What a model is made of.

    Attributes:
        architecture: Configuration of the model.
        model: The model on the meta device.
        parameters: Number of parameters of the whole model.
        tower: Place of the vision tower if it is not in the checkpoint, or None.
        tower_parameters: Number of parameters of the vision tower.
        needs: Predictions that were made for this shape, by what they depend on.
    """

    architecture: Architecture
    model: Llava | LanguageModel
    parameters: int
    tower: str | None
    tower_parameters: int
    needs: dict[str, Need] = field(default_factory=dict)

    def quantized(self, vision_tower: bool) -> int:
        """Returns the number of weights that are quantized."""
        layers = expected_layers(self.model, vision_tower)
        return sum(self.model.get_submodule(name).weight.numel() for name in layers)


def find_shape(config: ModelConfig) -> Shape | None:
    """Returns the shape of a model, or None if it cannot be known on this machine.

    That of a model with its own processor is not known: a picture takes as many tokens as its size
    asks for.

    Raises:
        UserError: If the config.json of the model cannot be used.
    """
    if config.conversation == CHAT:
        return None
    folder, owner = local_copy(config.path), f"model {config.name}"
    known = KNOWN.get(config.stands_for or config.name)
    built: Architecture
    content = read_config(folder, owner) if folder else known
    if content is None:
        return None
    tower = None
    if is_language_model(content):
        built = read_language_model(content, owner)
    elif folder and content.get("model_type") == LlavaArchitecture.model_type:
        built = LlavaArchitecture.from_pretrained(folder)
    else:
        blueprint = read_blueprint(content, owner)
        if blueprint.vision is None and not (folder and _carries(folder, blueprint, owner)):
            tower = config.vision_tower or blueprint.vision_tower
        built = blueprint.architecture(_tower(blueprint, config), owner)
    model = meta_model(built, getattr(torch, config.dtype))
    tower_part = model.model.vision_tower.parameters() if has_vision(built) else []
    whole = sum(p.numel() for p in model.parameters())
    return Shape(built, model, whole, tower, sum(p.numel() for p in tower_part))


def _carries(folder: Path, blueprint: Blueprint, owner: str) -> bool:
    try:
        return has_tower(Weights(folder, owner), blueprint.renamings)
    except UserError:  # only a part of the checkpoint is here
        return False


def _tower(blueprint: Blueprint, config: ModelConfig) -> CLIPVisionConfig:
    """Returns the tower of config.json or of its own repository, or else the published CLIP."""
    place = config.vision_tower or blueprint.vision_tower
    if blueprint.vision is not None:
        return blueprint.vision
    if place and (folder := local_copy(place)):
        return vision_config(read_config(folder, f"model {config.name}, vision tower"))
    return clip_tower(str(place))


def prompt_tokens(shape: Shape) -> int:
    """Returns the number of tokens of a typical question with an image."""
    return image_tokens(shape.architecture) + TEXT_TOKENS


def memory(config: RunConfig, shape: Shape) -> float:
    """Predicts the bytes that a cell needs on its device, without Python and its libraries."""
    size = getattr(torch, config.model.dtype).itemsize
    need, batch = _need(config, shape), config.evaluation.batch_size
    if config.full_precision or config.model.packed is not None:
        return MARGIN * (need.weights + batch * (need.cache + need.activations))
    # Simulated layers hold and compute in float32.
    added = max(FLOAT32 - size, 0)
    weights = need.weights + shape.quantized(config.quantizer.vision_tower) * added
    generation = batch * (need.cache + need.activations * max(FLOAT32, size) / size)
    text, tokens = shape.architecture.get_text_config(), prompt_tokens(shape)
    hidden = 2 * config.calibration.samples * tokens * text.hidden_size * size
    place = decoder_layers_name(shape.architecture)
    layer = shape.model.get_submodule(f"{place}.0")
    linears = quantizable(layer).values()
    inputs = FLOAT32 * MAX_TOKENS * sum(linear.in_features for linear in linears)
    trial = FLOAT32 * sum(linear.weight.numel() for linear in linears)
    if not config.stream:
        return MARGIN * (weights + max(generation, hidden + inputs + trial))
    decoder = shape.model.get_submodule(place)
    outside = shape.parameters - sum(p.numel() for p in decoder.parameters())
    # Whatever is outside the decoder layers is there twice for a moment: as files and as a copy.
    own = sum(p.numel() for p in layer.parameters()) * size
    most = max(2 * outside * size, outside * FLOAT32, own)
    streaming = MARGIN * (most + hidden + inputs + 2 * trial)
    if not config.evaluate:
        return streaming
    written = replace(config.model, packed=config.save_packed)
    evaluated = replace(config, model=written, save_packed=None, stream=False)
    return max(streaming, memory(evaluated, shape))


def _need(config: RunConfig, shape: Shape) -> Need:
    """Predicts what one question takes, in full precision unless the model is packed already."""
    packed = config.model.packed is not None
    variant = Variant(config.bits.label.lower(), "uniform") if packed else FULL
    answer = answer_length(config)
    key = repr((config.model.dtype, answer, packed and (config.bits, config.quantizer)))
    if key not in shape.needs:
        shape.needs[key] = predict(shape.architecture, config, variant, TEXT_TOKENS, answer)
    return shape.needs[key]

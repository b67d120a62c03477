"""How much memory and time a cell takes, from the shape of its model.

Memory is weights, and beside them the larger of what calibration and generation hold. A simulated
quantized layer keeps its weight in float32, whatever the type of the model, and so does one that is
to be packed, until it is; only a model that was packed before is small from the start, and one
that is streamed holds a decoder layer at a time.

Time is that of two decoder layers with the real widths, measured here, times layers and tokens: too
much in that every answer is as long as it may be, too little in that attention over the cache, the
vision tower and a method's search come on top.
"""

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, CLIPVisionConfig

from qvlm.cell import inputs as prepare
from qvlm.config.schema import ModelConfig, RunConfig
from qvlm.errors import UserError
from qvlm.models.architectures import KNOWN, clip_tower
from qvlm.models.checkpoints.families import Blueprint, read_blueprint, read_config, vision_config
from qvlm.models.checkpoints.tensors import has_tower
from qvlm.models.checkpoints.weights import Weights
from qvlm.models.llava import Llava, LlavaArchitecture, image_tokens
from qvlm.models.meta import LAYERS, meta_model
from qvlm.packing.model import weight_bytes
from qvlm.packing.plan import plan
from qvlm.planning.footprint import TEXT_TOKENS
from qvlm.planning.sources import local_copy
from qvlm.quantization import QuantLinear, TokenQuantizer, expected_layers
from qvlm.quantization.block import MAX_TOKENS
from qvlm.quantization.targets import quantizable

MARGIN = 1.1  # buffers, scales, fragmentation
CPU_TOKENS = 64  # of the prompt that a CPU is timed on: it is no faster with more
DECODER_LAYERS = 2  # timed; a mixture of experts is in every other layer
TOWER_BYTES = 4 * 428_000_000  # a repository of CLIP ViT-L/14: float32, text model included


@dataclass(frozen=True, eq=False)
class Shape:
    """What a model is made of.

    Attributes:
        parameters: of the whole model.
        tower: the vision tower's place, where it is not in the checkpoint.
        tower_parameters: of the vision tower.
        assumed: taken from what is published, because no config.json is here.
    """

    architecture: LlavaArchitecture
    model: Llava
    parameters: int
    tower: str | None
    tower_parameters: int
    assumed: bool

    def quantized(self, vision_tower: bool) -> int:
        """How many weights are quantized."""
        layers = expected_layers(self.model, vision_tower)
        return sum(self.model.get_submodule(name).weight.numel() for name in layers)


def find_shape(config: ModelConfig) -> Shape | None:
    """The shape of a model, or None if nothing here says what it is.

    Raises:
        UserError: if its config.json cannot be used.
    """
    folder, owner = local_copy(config.path), f"model {config.name}"
    known = KNOWN.get(config.stands_for or config.name)
    content = read_config(folder, owner) if folder else known
    if content is None:
        return None
    tower = None
    if folder and content.get("model_type") == LlavaArchitecture.model_type:
        architecture = LlavaArchitecture.from_pretrained(folder)
    else:
        blueprint = read_blueprint(content, owner)
        if blueprint.vision is None and not (folder and _carries(folder, blueprint, owner)):
            tower = config.vision_tower or blueprint.vision_tower
        architecture = blueprint.architecture(_tower(blueprint, config), owner)
    model = meta_model(architecture, getattr(torch, config.dtype))
    of_tower = sum(p.numel() for p in model.model.vision_tower.parameters())
    whole = sum(p.numel() for p in model.parameters())
    return Shape(architecture, model, whole, tower, of_tower, folder is None)


def _carries(folder: Path, blueprint: Blueprint, owner: str) -> bool:
    try:
        return has_tower(Weights(folder, owner), blueprint.renamings)
    except UserError:  # only some of it is here
        return False


def _tower(blueprint: Blueprint, config: ModelConfig) -> CLIPVisionConfig:
    """The tower as config.json or its own repository has it, or the CLIP that it is known to be."""
    place = config.vision_tower or blueprint.vision_tower
    if blueprint.vision is not None:
        return blueprint.vision
    if place and (folder := local_copy(place)):
        return vision_config(read_config(folder, f"model {config.name}, vision tower"))
    return clip_tower(str(place))


def prompt_tokens(shape: Shape) -> int:
    """Tokens of a question with a picture."""
    return image_tokens(shape.architecture) + TEXT_TOKENS


def memory(config: RunConfig, shape: Shape) -> float:
    """Bytes that a cell needs on its device beside what Python and its libraries take."""
    text = shape.architecture.text_config
    size = getattr(torch, config.model.dtype).itemsize
    batch, tokens = config.evaluation.batch_size, prompt_tokens(shape)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = heads * text.hidden_size // text.num_attention_heads
    cache = 2 * text.num_hidden_layers * width * (tokens + config.evaluation.max_new_tokens)
    flow = tokens * (2 * text.hidden_size + 3 * text.intermediate_size)
    generation = batch * (cache * size + flow * max(size, 4))
    if config.full_precision:
        return MARGIN * (shape.parameters * size + generation)
    if config.model.packed is not None:
        packed = meta_model(shape.architecture, getattr(torch, config.model.dtype))
        plan(packed, prepare.quantization_config(config), normal_float=False)
        return MARGIN * (weight_bytes(packed) + generation)
    quantized = shape.quantized(config.quantizer.vision_tower)
    weights = quantized * 4 + (shape.parameters - quantized) * size
    hidden = 2 * config.calibration.samples * tokens * text.hidden_size * size
    layer = shape.model.get_submodule("model.language_model.layers.0")
    linears = quantizable(layer).values()
    inputs = 4 * MAX_TOKENS * sum(linear.in_features for linear in linears)
    trial = 4 * sum(linear.weight.numel() for linear in linears)
    if not config.stream:
        return MARGIN * (weights + max(generation, hidden + inputs + trial))
    decoder = shape.model.get_submodule(LAYERS)
    outside = shape.parameters - sum(p.numel() for p in decoder.parameters())
    # Of what is outside, files and copy are there together for a moment.
    most = max(2 * outside * size, outside * 4, sum(p.numel() for p in layer.parameters()) * size)
    need = MARGIN * (most + hidden + inputs + 2 * trial)
    if config.evaluation.limit == 0:
        return need
    return max(need, memory(prepare.streamed(config), shape))


def seconds(config: RunConfig, shape: Shape, device: str, questions: int) -> float:
    """About how long an evaluation takes if every answer is as long as it may be."""
    text, evaluation = shape.architecture.text_config, config.evaluation
    tokens = prompt_tokens(shape)
    rows = CPU_TOKENS if device == "cpu" else evaluation.batch_size * tokens
    dtype, quantized = config.model.dtype, not config.full_precision
    prompt = _layer_seconds(shape, dtype, device, 1, rows, quantized) / rows
    step = _layer_seconds(shape, dtype, device, evaluation.batch_size, 1, quantized)
    answer = evaluation.max_new_tokens * step / evaluation.batch_size
    return questions * text.num_hidden_layers * (tokens * prompt + answer)


@functools.cache
@torch.inference_mode()
def _layer_seconds(
    shape: Shape, dtype: str, device: str, batch: int, tokens: int, quantized: bool
) -> float:
    """The seconds of one decoder layer for [batch, tokens], of uninitialised weights."""
    few = copy.deepcopy(shape.architecture.text_config)
    count = few.num_hidden_layers = min(DECODER_LAYERS, few.num_hidden_layers)
    few.vocab_size, few.pad_token_id = 8, None
    if getattr(few, "moe_layers", None) is not None:
        few.moe_layers = [layer for layer in few.moe_layers if layer < count]
    with torch.device("meta"):
        model = AutoModel.from_config(few, dtype=getattr(torch, dtype))
    model.to_empty(device=device).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.fill_(0.01)
    if quantized:
        for layer in model.layers:
            for name, linear in quantizable(layer).items():
                parent = layer.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], _simulated(linear))
    inputs = torch.full((batch, tokens, few.hidden_size), 0.01, dtype=model.dtype, device=device)
    return min(_timed(model, inputs) for _ in range(2)) / count


def _simulated(linear: nn.Linear) -> QuantLinear:
    return QuantLinear(linear.weight, linear.bias, TokenQuantizer(8), TokenQuantizer(8))


def _timed(model: Callable[..., object], inputs: Tensor) -> float:
    begun = time.perf_counter()
    model(inputs_embeds=inputs, use_cache=False)
    if inputs.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun

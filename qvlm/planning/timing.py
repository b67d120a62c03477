"""Estimates how long an evaluation takes, from a timing of two decoder layers on this machine.

The layers have the real widths, and their seconds are multiplied by layers and tokens. The estimate
is too high in that every answer is as long as allowed, and too low in that attention over the
cache, the vision tower and the search of a method come on top.
"""

import copy
import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoModel

from qvlm.cell.inputs import answer_length
from qvlm.config.schema import RunConfig
from qvlm.planning.estimates import Shape, prompt_tokens
from qvlm.quantization import QuantLinear, TokenQuantizer
from qvlm.quantization.targets import quantizable

CPU_TOKENS = 64  # prompt tokens that a CPU is timed on: per token it is not faster with more
DECODER_LAYERS = 2  # timed layers; a mixture of experts is in every other layer


def seconds(config: RunConfig, shape: Shape, device: str, questions: int) -> float:
    """Estimates the seconds of an evaluation in which every answer is as long as allowed.

    Args:
        config: Configuration of the cell.
        shape: Shape of its model.
        device: Device that is timed.
        questions: Number of questions.
    """
    text, evaluation = shape.architecture.get_text_config(), config.evaluation
    tokens = prompt_tokens(shape)
    rows = CPU_TOKENS if device == "cpu" else evaluation.batch_size * tokens
    dtype, quantized = config.model.dtype, not config.full_precision
    prompt = _layer_seconds(shape, dtype, device, 1, rows, quantized) / rows
    step = _layer_seconds(shape, dtype, device, evaluation.batch_size, 1, quantized)
    answer = answer_length(config) * step / evaluation.batch_size
    return questions * text.num_hidden_layers * (tokens * prompt + answer)


@functools.cache
@torch.inference_mode()
def _layer_seconds(
    shape: Shape, dtype: str, device: str, batch: int, tokens: int, quantized: bool
) -> float:
    """Times one decoder layer with real widths and made-up weights on [batch, tokens]."""
    few = copy.deepcopy(shape.architecture.get_text_config())
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
                layer.set_submodule(name, _simulated(linear))
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

"""How long a search of ranges would take at full scale, estimated from simulated layers."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qvlm.models.architectures import architecture
from qvlm.models.meta import meta_model
from qvlm.models.networks import image_tokens
from qvlm.quantization.targets import block_layers, quantizable
from qvlm.tables.table4_scale.clock import QuestionTimes

# A search tries five percentiles for each linear, or all combinations for three linears jointly.
GRID, DEPTH = 5, 3
SEARCH_TOKENS = 4096


@dataclass(frozen=True)
class SearchEstimate:
    """Cost of a search over the ranges of all blocks.

    Attributes:
        alone: Seconds, where each linear is searched alone.
        jointly: Seconds, where three linears are searched at a time.
        alone_flops: Operations in the products of linears, searched alone.
        jointly_flops: Operations in the products of linears, searched jointly.
    """

    alone: float
    jointly: float
    alone_flops: float
    jointly_flops: float


def estimate_search(model: str, simulated: Sequence[QuestionTimes], prompt: int) -> SearchEstimate:
    """Estimates a search from the time of simulated layers.

    Each setting runs a layer on `SEARCH_TOKENS` tokens. Layer-wise search tries each percentile for
    each linear. Joint search tries at most all settings of three linears together.

    Args:
        model: Option of conf/model.
        simulated: Times of a question to the model with simulated layers, one per repeat.
        prompt: Number of tokens of that question.
    """
    built = architecture(model)
    blocks = block_layers(meta_model(built, torch.bfloat16), True).values()
    per_token = {
        "language": statistics.median(times.prefill for times in simulated) / prompt,
        "vision": statistics.median(times.vision for times in simulated) / image_tokens(built),
    }
    once = {part: SEARCH_TOKENS * seconds for part, seconds in per_token.items()}
    flops = dict.fromkeys(once, 0.0)
    settings = {part: [0, 0] for part in once}
    for kind, block in blocks:
        part = "language" if kind == "language" else "vision"
        linears = quantizable(block).values()
        flops[part] += 2 * SEARCH_TOKENS * sum(linear.weight.numel() for linear in linears)
        runs, rest = divmod(len(linears), DEPTH)
        joint = runs * GRID**DEPTH + (GRID**rest if rest else 0)
        for index, count in enumerate((GRID * len(linears), joint)):
            settings[part][index] = max(settings[part][index], count)
    return SearchEstimate(
        *(sum(once[part] * settings[part][index] for part in once) for index in (0, 1)),
        *(sum(flops[part] * settings[part][index] for part in once) for index in (0, 1)),
    )

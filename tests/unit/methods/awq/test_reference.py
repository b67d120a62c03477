"""AWQ's reference search against llm-awq's, written out, on real blocks of both miniatures."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qvlm.cell import inputs
from qvlm.methods.awq.method import AWQ
from qvlm.quantization.block import Block
from qvlm.quantization.calibration import Walk, batch_by_length
from qvlm.quantization.hooks import hooked
from qvlm.quantization.spec import QuantizationConfig, QuantSpec
from tests.helpers.configs import load

pytestmark = [pytest.mark.instruction_set, pytest.mark.slow]

BITS, GROUP = 4, 64


def pseudo_quantize(weight: Tensor) -> Tensor:
    """Asymmetric min-max rounding in groups along the input."""
    groups = weight.reshape(-1, GROUP)
    highest, lowest = groups.amax(1, keepdim=True), groups.amin(1, keepdim=True)
    # In float32, as in the quantizer.
    scale = highest.float() / (2**BITS - 1) - lowest.float() / (2**BITS - 1)
    zero = (-torch.round(lowest.float() / scale)).clamp(0, 2**BITS - 1)
    codes = (torch.round(groups.float() / scale) + zero).clamp(0, 2**BITS - 1)
    return ((codes - zero) * scale).to(weight.dtype).reshape(weight.shape)


def search_scale(
    run: Callable[[], Sequence[Tensor]], linears: Sequence[nn.Linear], activity: Tensor
) -> tuple[float, Tensor]:
    """The alpha and scale of the least squared error of a module's output, over i / 20."""
    exact = run()
    best: tuple[float, float, Tensor] = (float("inf"), 0.0, activity)
    for step in range(20):
        scale = activity.pow(step / 20).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        kept = [linear.weight.data.clone() for linear in linears]
        for linear in linears:
            linear.weight.data = pseudo_quantize(linear.weight.data * scale) / scale
        errors = [(one - other).square().sum() for one, other in zip(run(), exact, strict=True)]
        loss = float(sum(errors)) / sum(output.numel() for output in exact)
        for linear, weight in zip(linears, kept, strict=True):
            linear.weight.data = weight
        if loss < best[0]:
            best = loss, step / 20, scale
    return best[1], best[2]


def clip(weight: Tensor, x: Tensor) -> Tensor:
    """Each group clamped to the share of max|w| that changes its part of the output least."""
    x = x[:: max(1, len(x) // 512)].reshape(len(x[:: max(1, len(x) // 512)]), -1, GROUP)
    groups = weight.reshape(len(weight), -1, GROUP)
    largest = groups.abs().amax(2, keepdim=True)
    exact = torch.einsum("ogk,tgk->ogt", groups, x)
    least = torch.full_like(largest, float("inf"))
    chosen = largest.clone()
    for step in range(10):
        bound = largest * (1 - step / 20)
        clamped = torch.minimum(torch.maximum(groups, -bound), bound)
        rounded = pseudo_quantize(clamped).reshape(groups.shape)
        error = (torch.einsum("ogk,tgk->ogt", rounded, x) - exact).square().mean(2, keepdim=True)
        chosen = torch.where(error < least, bound, chosen)
        least = torch.minimum(error, least)
    return torch.minimum(torch.maximum(groups, -chosen), chosen).reshape(weight.shape)


def decoder_block(model: str) -> Block:
    """The first decoder layer of a miniature, in floating point, with its calibration inputs."""
    config = load(f"model={model}", "calibration.samples=4")
    loaded = inputs.load(config, "cpu")
    samples, _ = inputs.draw_calibration(config)
    quantization = QuantizationConfig(
        QuantSpec(BITS, "per_group", GROUP),
        QuantSpec(BITS, "per_token"),
        QuantSpec(BITS, "per_token"),
        vision_tower=False,
    )
    walk = Walk(loaded.model, batch_by_length(loaded, samples, 8), quantization)
    return next(block for block in walk.blocks() if block.kind == "language")


def runner(block: Block, name: str) -> Callable[[], Sequence[Tensor]]:
    """Runs a module of the block on what reaches it."""
    module = block.module.get_submodule(name)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    with hooked({module: lambda m, args, kwargs: calls.append((args, kwargs))}, with_kwargs=True):
        block.run()
    return lambda: block.run(module, calls)


@pytest.mark.parametrize("model", ["mini_llava", "mini_moe_llava"])
@torch.no_grad()
def test_choices_and_weights_are_those_of_llm_awq(model: str) -> None:
    block = decoder_block(model)
    samples = block.linear_inputs()
    experts = [name for name in block.linears if name.endswith("gate_proj")]
    gate_up = [name.replace("gate", part) for name in experts for part in ("gate", "up")]
    places = {
        "input_layernorm": ([f"self_attn.{part}_proj" for part in "qkv"], "self_attn"),
        "self_attn.v_proj": (["self_attn.o_proj"], "self_attn.o_proj"),
        "post_attention_layernorm": (gate_up, "mlp"),
        **{
            gate.replace("gate", "up"): ([down := gate.replace("gate", "down")], down)
            for gate in experts
        },
    }
    expected: dict[str, float] = {}
    scales: dict[str, Tensor] = {}
    for source, (readers, module) in places.items():
        activity = torch.cat([samples[name] for name in readers]).abs().mean(0)
        linears = [block.linears[name] for name in readers]
        expected[source], scale = search_scale(runner(block, module), linears, activity)
        scales |= dict.fromkeys(readers, scale)
    weights = {name: linear.weight.detach().clone() for name, linear in block.linears.items()}
    _, entry = AWQ(reference=True).quantize_block(block)
    assert entry["kept"] == "AWQ"
    found = {source: choice["alpha"] for source, choice in entry["scales"].items()}
    assert found == pytest.approx(expected)
    for name in (experts[0], experts[0].replace("gate", "down")):
        clipped = clip(weights[name] * scales[name], samples[name] / scales[name])
        groups = clipped.reshape(len(clipped), -1, GROUP)
        scale = (groups.amax(2) - groups.amin(2)) / (2**BITS - 1)
        found_scale = block.module.get_submodule(name).weight_quantizer.scale[..., 0]
        off = (found_scale / scale - 1).abs() > 1e-5
        # The zero point of a clamped, symmetric range is 7.5, and the last bit decides how it is
        # rounded. That may change which of two ratios has the smaller error.
        assert float(off.double().mean()) < 0.05, name


def test_only_the_decoder_is_searched() -> None:
    config = load("model=mini_llava", "calibration.samples=2")
    loaded = inputs.load(config, "cpu")
    samples, _ = inputs.draw_calibration(config)
    walk = Walk(
        loaded.model, batch_by_length(loaded, samples, 8), inputs.quantization_config(config)
    )
    method = AWQ(reference=True)
    assert method.name == "AWQ (reference search)"
    for block in walk.blocks():
        tried, entry = method.quantize_block(block)
        if block.kind == "language":
            assert tried and entry["scales"]
            break
        assert (tried, entry["kept"], entry["scales"]) == (0, "RTN", {})

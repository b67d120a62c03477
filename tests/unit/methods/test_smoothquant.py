"""SmoothQuant: the paper's scale, folded exactly, and never worse than RTN after a search."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qvlm.errors import UserError
from qvlm.methods.awq.rescaling import find_rescalings
from qvlm.methods.objective import mean_squared_error
from qvlm.methods.rtn import RTN
from qvlm.methods.smoothquant import SmoothQuant, smoothing_scale
from qvlm.quantization.calibration import Walk
from qvlm.quantization.linear import QuantLinear
from qvlm.quantization.spec import QuantizationConfig, QuantSpec
from qvlm.quantization.verification import check_bits, expected_layers, measure_bits
from tests.helpers.toy import toy_batch, toy_batches, toy_llava

pytestmark = pytest.mark.instruction_set

Q = "self_attn.q_proj"


def config(bits: int = 4, language: str = "per_tensor") -> QuantizationConfig:
    return QuantizationConfig(
        QuantSpec(bits, "per_channel"),
        QuantSpec(bits, language),
        QuantSpec(bits, "per_token"),
        False,
    )


def with_outliers(text: str = "llama") -> nn.Module:
    """A toy whose norms make a few channels large, as in a real language model."""
    model = toy_llava(text)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("layernorm") and "language_model" in name:
                module.weight[2] = 15
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**toy_batch(seed=5), use_cache=False).logits


def test_the_scale_is_that_of_the_paper() -> None:
    walk = Walk(with_outliers(), toy_batches(), config())
    block = next(block for block in walk.blocks() if block.kind == "language")
    samples = block.linear_inputs()
    rescaling = find_rescalings(block)[0]
    readers = [Q, "self_attn.k_proj", "self_attn.v_proj"]
    assert list(rescaling.readers) == readers
    x = samples[Q].numpy()
    w = np.concatenate([block.linears[name].weight.detach().numpy() for name in readers])
    for alpha in (0.0, 0.3, 0.5, 1.0):
        expected = np.abs(x).max(0) ** alpha / np.abs(w).max(0) ** (1 - alpha)
        found = smoothing_scale(block, rescaling, samples, alpha).numpy()
        assert np.allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("text", ["llama", "routed", "mixtral"])
def test_at_8_bits_the_function_is_kept_and_outliers_are_gone(text: str) -> None:
    exact, model = logits(with_outliers(text)), with_outliers(text)
    SmoothQuant(alpha=0.5).quantize(Walk(model, toy_batches(), config(8, "per_token")))
    assert float((logits(model) - exact).norm() / exact.norm()) < 0.1
    inputs: list[Tensor] = []
    layer = model.get_submodule(f"model.language_model.layers.1.{Q}")
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    logits(model)
    largest = inputs[0].abs().amax((0, 1))
    assert float(largest.max() / largest.median()) < 8  # 15 before


def test_a_search_is_never_worse_than_rtn_on_a_block() -> None:
    model = with_outliers()
    walk, method = Walk(model, toy_batches(), config()), SmoothQuant()
    for block in walk.blocks():
        samples, target = block.linear_inputs(), block.float_outputs()
        for name, x in samples.items():
            block.replace(name, block.quantize_linear(name, x))
        nearest = mean_squared_error(block.run(), target)
        for name in samples:
            block.restore(name)
        entry = method.quantize_block(block)
        assert entry["error"] <= nearest
        assert entry["error"] == mean_squared_error(block.run(), target)
        if block.kind == "language":
            assert entry["alpha"] is not None and entry["error"] < 0.9 * nearest


def test_it_beats_rtn_where_channels_are_large() -> None:
    exact, errors = logits(with_outliers()), []
    for method in (SmoothQuant(), RTN()):
        model = with_outliers()
        method.quantize(Walk(model, toy_batches(), config()))
        errors.append(float((logits(model) - exact).norm()))
    assert errors[0] < 0.8 * errors[1]


def test_the_bits_are_proven_and_the_report_names_what_is_not_scaled() -> None:
    model = with_outliers("routed")
    expected = expected_layers(model, vision_tower=False)
    report = SmoothQuant(alpha=0.5).quantize(Walk(model, toy_batches(), config()))
    assert check_bits(measure_bits(model, expected, toy_batches(), config())) == []
    details = json.loads(json.dumps(asdict(report)))["details"]
    assert report.candidates == len(details["blocks"]) == 3
    assert details["blocks"][0]["unscaled"] == ["linear_1", "linear_2"]
    assert [block["alpha"] for block in details["blocks"]] == [0.5, 0.5, 0.5]
    replaced = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert replaced == set(expected)


def test_a_block_without_data_is_rounded_to_nearest() -> None:
    model = toy_llava()
    batches = [toy_batch(image=False)]
    report = SmoothQuant().quantize(Walk(model, batches, config()))
    assert report.details["blocks"][0]["error"] is None
    assert report.details["blocks"][0]["alpha"] is None
    assert report.details["uncalibrated"]


@pytest.mark.parametrize(
    ("options", "named"),
    [({"alpha": 1.5}, "method.alpha=1.5"), ({"n_grid": 1}, "method.n_grid=1")],
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=named):
        SmoothQuant(**options)

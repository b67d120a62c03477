"""RTN and full precision as methods: reproducible, right to the integer, and never silent."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qvlm.errors import RunError
from qvlm.methods import RTN, FullPrecision, Method
from qvlm.quantization.calibration import Walk
from qvlm.quantization.linear import QuantLinear
from qvlm.quantization.quantizer import UniformQuantizer
from qvlm.quantization.spec import QuantizationConfig, QuantSpec
from qvlm.quantization.verification import expected_layers
from tests.helpers.toy import toy_batch, toy_batches, toy_llava

pytestmark = pytest.mark.instruction_set


def config(bits: int, language: str = "per_channel_group") -> QuantizationConfig:
    return QuantizationConfig(
        QuantSpec(bits, "per_channel"), QuantSpec(bits, language, 16), QuantSpec(bits, "per_token")
    )


def rounded(bits: int, text: str = "llama", language: str = "per_channel_group") -> nn.Module:
    model = toy_llava(text)
    RTN().quantize(Walk(model, toy_batches(), config(bits, language)))
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**toy_batch(seed=5)).logits


def numpy_codes(row: np.ndarray, bits: int) -> np.ndarray:
    """Round to nearest on the ratio of the least sum of |w - w_hat|^2."""
    best = (np.inf, np.zeros(0))
    for ratio in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4):
        lo, hi = ratio * min(row.min(), 0.0), ratio * max(row.max(), 0.0)
        scale = (hi - lo) / (2**bits - 1)
        zero_point = np.rint(-lo / scale)
        q = np.clip(np.rint(row / scale) + zero_point, 0, 2**bits - 1)
        distance = np.square(row - (q - zero_point) * scale).sum()
        if distance < best[0]:
            best = (distance, q)
    return best[1]


@pytest.mark.parametrize("bits", [3, 4])
def test_integers_are_those_of_numpy(bits: int) -> None:
    model, quantized = toy_llava("routed"), rounded(bits, "routed")
    off = total = 0
    for name in expected_layers(model, vision_tower=True):
        weight = model.get_submodule(name).weight.detach().double().numpy()
        layer = quantized.get_submodule(name)
        assert isinstance(layer, QuantLinear) and layer.layer_name == name
        expected = np.stack([numpy_codes(row, bits) for row in weight])
        off += int((layer.weight_codes().numpy() != expected).sum())
        total += expected.size
    assert off <= total * 1e-4  # a value half-way between two codes in float32


@pytest.mark.parametrize("text", ["llama", "routed", "mixtral"])
def test_twice_gives_the_same_integers_and_scales(text: str) -> None:
    first, second = rounded(4, text), rounded(4, text)
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert torch.equal(logits(first), logits(second))


@pytest.mark.parametrize("language", ["per_tensor", "per_token", "per_channel"])
def test_more_bits_are_closer_to_full_precision(language: str) -> None:
    """With min-max ranges of the very batch that is measured, nothing but rounding is left."""
    exact, ratios = logits(toy_llava()), []
    for bits in (2, 4, 8):
        weight, inputs, vision = (
            QuantSpec(bits, granularity, ranges="minmax")
            for granularity in ("per_channel", language, "per_token")
        )
        model = toy_llava()
        quantization = QuantizationConfig(weight, inputs, vision)
        RTN().quantize(Walk(model, [toy_batch(seed=5)], quantization))
        ratios.append(float((logits(model) - exact).norm() / exact.norm()))
    assert ratios[0] > ratios[1] > ratios[2]
    assert ratios[2] < 0.05 < ratios[0]


def test_every_expected_layer_is_replaced_and_nothing_else() -> None:
    before, model = toy_llava("routed"), rounded(4, "routed")
    expected = set(expected_layers(before, vision_tower=True))
    replaced = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert replaced == expected
    kept = dict(before.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, kept[name])


def test_activations_of_the_language_model_have_one_scale_per_cluster() -> None:
    layer = rounded(4).get_submodule("model.language_model.layers.0.mlp.down_proj")
    assert isinstance(layer, QuantLinear)
    assert isinstance(layer.input_quantizer, UniformQuantizer)
    assert layer.input_quantizer.clusters is not None
    assert layer.input_quantizer.clusters.bincount().tolist() == [16] * 4
    assert layer.input_quantizer.scale.unique().numel() == 4


def test_the_report_names_layers_without_tokens_and_fits_into_json() -> None:
    report = RTN().quantize(Walk(toy_llava("routed"), toy_batches(), config(4)))
    assert (report.search_seconds, report.candidates) == (0.0, 0)
    named = json.loads(json.dumps(asdict(report)))["details"]["uncalibrated"]
    assert named and all("experts.2." in name for name in named)


def test_full_precision_changes_nothing() -> None:
    model = toy_llava()
    before = logits(model)
    method: Method = FullPrecision()
    report = method.quantize(Walk(model, toy_batches(), config(4)))
    assert method.name == "FP" and report.candidates == 0
    assert torch.equal(logits(model), before)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


def test_an_activation_that_is_not_finite_ends_the_run_with_its_layer() -> None:
    model = rounded(4)
    with torch.no_grad():
        model.model.language_model.layers[1].post_attention_layernorm.weight[0] = float("inf")
    with pytest.raises(RunError, match=r"model\.language_model\.layers\.1\.mlp\.gate_proj"):
        logits(model)

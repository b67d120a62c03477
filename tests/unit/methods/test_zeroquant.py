"""The ZeroQuant-V2-like baseline: RTN whose activations are all dynamic per token."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from qvlm.errors import RunError
from qvlm.methods.rtn import RTN
from qvlm.methods.zeroquant import ZeroQuant
from qvlm.quantization.calibration import Walk
from qvlm.quantization.linear import QuantLinear
from qvlm.quantization.quantizer import TokenQuantizer
from qvlm.quantization.spec import QuantizationConfig, QuantSpec
from qvlm.quantization.verification import check_bits, expected_layers, measure_bits
from tests.helpers.toy import toy_batch, toy_batches, toy_llava

pytestmark = pytest.mark.instruction_set

SHARED = QuantizationConfig(
    weight=QuantSpec(4, "per_group", 16),
    language=QuantSpec(4, "per_channel_group", 16),
    vision=QuantSpec(5, "per_tensor"),
)


def quantized(text: str = "llama") -> nn.Module:
    model = toy_llava(text)
    ZeroQuant().quantize(Walk(model, toy_batches(), SHARED))
    return model


def layers(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


@pytest.mark.parametrize("text", ["llama", "routed", "mixtral"])
def test_every_activation_is_dynamic_per_token(text: str) -> None:
    found = layers(quantized(text))
    expected = expected_layers(toy_llava(text), vision_tower=True)
    assert sorted(found) == sorted(expected)
    for name, layer in found.items():
        assert isinstance(layer.input_quantizer, TokenQuantizer)
        assert layer.input_quantizer.bits == (5 if "vision_tower" in name else 4)
        assert layer.weight_quantizer.group_size == 16
    assert check_bits(measure_bits(quantized(text), expected, toy_batches(), SHARED)) == []


def test_it_is_rtn_with_per_token_granularity() -> None:
    ours, theirs = quantized("routed"), toy_llava("routed")
    per_token = replace(
        SHARED,
        language=replace(SHARED.language, granularity="per_token"),
        vision=replace(SHARED.vision, granularity="per_token"),
    )
    RTN().quantize(Walk(theirs, toy_batches(), per_token))
    one, two = ours.state_dict(), theirs.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_tokens_scale_depends_on_that_token_alone() -> None:
    """So a loud row in the batch does not disturb a quiet one, as a static scale would."""
    model, batch = quantized(), toy_batch(image=False)
    alone = {key: value[:1] for key, value in batch.items()}
    with torch.no_grad():
        expected = model(**alone).logits
        together = model(**batch).logits[:1]
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)


def test_the_walk_gets_its_quantization_back() -> None:
    walk = Walk(toy_llava("routed"), toy_batches(), SHARED)
    report = ZeroQuant().quantize(walk)
    assert walk.quantization is SHARED
    assert (report.search_seconds, report.candidates) == (0.0, 0)
    named = report.details["uncalibrated"]
    assert named and all("experts.2." in name for name in named)

    model = toy_llava()
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    walk = Walk(model, toy_batches(), SHARED)
    with pytest.raises(RunError, match=r"layers\.1\.mlp\.down_proj"):
        ZeroQuant().quantize(walk)
    assert walk.quantization is SHARED

"""The QLoRA baseline: NormalFloat weights instead of the shared quantizer's, the rest as RTN."""

import json
from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn

from qvlm.errors import UserError
from qvlm.methods.qlora import QLoRA
from qvlm.methods.rtn import RTN
from qvlm.quantization.calibration import Walk
from qvlm.quantization.linear import QuantLinear
from qvlm.quantization.normal_float import NormalFloatQuantizer
from qvlm.quantization.spec import QuantizationConfig, QuantSpec
from qvlm.quantization.verification import check_bits, expected_layers, measure_bits
from tests.helpers.nf4 import reference
from tests.helpers.toy import toy_batch, toy_batches, toy_llava

pytestmark = [pytest.mark.instruction_set, pytest.mark.slow]


def config(bits: int, language: str = "per_channel_group") -> QuantizationConfig:
    return QuantizationConfig(
        QuantSpec(bits, "per_group", 32),
        QuantSpec(bits, language, 16),
        QuantSpec(bits, "per_token"),
    )


def quantized(bits: int, text: str = "llama", language: str = "per_channel_group") -> nn.Module:
    model = toy_llava(text)
    QLoRA().quantize(Walk(model, toy_batches(), config(bits, language)))
    return model


def layers(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**toy_batch(seed=5)).logits


def test_every_weight_is_the_nf4_of_bitsandbytes() -> None:
    model, found = toy_llava("routed"), layers(quantized(4, "routed"))
    assert sorted(found) == sorted(expected_layers(model, vision_tower=True))
    for name, layer in found.items():
        weight = model.get_submodule(name).weight.detach()
        assert weight.dtype == layer.weight.dtype == torch.float32
        codes, expected = reference(weight)
        assert torch.equal(layer.weight_codes(), codes), name
        assert torch.equal(layer.weight, expected), name


def test_activations_are_quantized_as_rtn_does() -> None:
    ours, theirs = layers(quantized(4)), toy_llava()
    RTN().quantize(Walk(theirs, toy_batches(), config(4)))
    first = "model.vision_tower.encoder.layers.0.self_attn.q_proj"  # before inputs differ
    rtn = layers(theirs)
    assert ours.keys() == rtn.keys()
    assert ours[first].input_quantizer.ratio == rtn[first].input_quantizer.ratio
    for name, layer in ours.items():
        assert isinstance(layer.weight_quantizer, NormalFloatQuantizer)
        assert type(layer.input_quantizer) is type(rtn[name].input_quantizer)
        assert layer.input_quantizer.bits == 4


@pytest.mark.parametrize("language", ["per_channel_group", "per_channel"])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_the_bits_are_proven(bits: int, language: str) -> None:
    expected = expected_layers(toy_llava("mixtral"), vision_tower=True)
    model = quantized(bits, "mixtral", language)
    rows = measure_bits(model, expected, toy_batches(), config(bits, language))
    assert len(rows) == len(expected) and check_bits(rows) == []


def test_more_bits_are_closer_to_full_precision() -> None:
    exact = logits(toy_llava())
    errors = []
    for bits in (2, 4, 6):
        model = toy_llava()
        weights_only = QuantizationConfig(
            QuantSpec(bits, "per_channel"), QuantSpec(8, "per_token"), QuantSpec(8, "per_token")
        )
        QLoRA().quantize(Walk(model, toy_batches(), weights_only))
        errors.append(float((logits(model) - exact).norm() / exact.norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 < errors[0]


def test_sizes_and_double_quantization_reach_the_quantizers() -> None:
    def run(**parameters: object) -> NormalFloatQuantizer:
        model = toy_llava()
        QLoRA(**parameters).quantize(Walk(model, toy_batches(), config(4)))
        quantizer = layers(model)["model.multi_modal_projector.linear_1"].weight_quantizer
        assert isinstance(quantizer, NormalFloatQuantizer)
        return quantizer

    default, exact = run(), run(double_quantization=False)
    assert (default.block_size, len(default.absmax)) == (64, 16)
    assert not torch.equal(default.dequantized_absmax, default.absmax)
    assert torch.equal(exact.dequantized_absmax, exact.absmax)
    assert len(run(block_size=32).absmax) == 32
    assert not torch.equal(
        run(constant_block_size=2).dequantized_absmax, default.dequantized_absmax
    )


def test_twice_gives_the_same_integers_and_the_report_fits_into_json() -> None:
    first, second = quantized(4, "routed").state_dict(), quantized(4, "routed").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    report = QLoRA().quantize(Walk(toy_llava("routed"), toy_batches(), config(4)))
    assert (report.search_seconds, report.candidates) == (0.0, 0)
    named = json.loads(json.dumps(asdict(report)))["details"]["uncalibrated"]
    assert named and all("experts.2." in name for name in named)


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"block_size": 0}, "method.block_size=0"),
        ({"block_size": 6.5}, "method.block_size=6.5"),
        ({"constant_block_size": -1}, "method.constant_block_size=-1"),
        ({"double_quantization": 2}, "method.double_quantization=2"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(parameters: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        QLoRA(**parameters)

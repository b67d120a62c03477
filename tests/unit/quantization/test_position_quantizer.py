"""Ranges of positions in the vision tower: by the formula, through every method, and packed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qvlm.errors import UserError
from qvlm.methods.awq import AWQ
from qvlm.methods.gptq import GPTQ
from qvlm.methods.roco import RoCo
from qvlm.methods.rtn import RTN
from qvlm.methods.smoothquant import SmoothQuant
from qvlm.packing.layer import PackedLinear
from qvlm.packing.model import pack_model
from qvlm.packing.simulated import simulated
from qvlm.quantization import (
    PositionQuantizer,
    QuantizationConfig,
    QuantLinear,
    QuantSpec,
    Walk,
    activation_quantizer,
    check_bits,
    compute_in_float64,
    expected_layers,
    measure_bits,
)
from tests.helpers.layers import logits
from tests.helpers.toy import toy_batches, toy_llava

POSITIONS = 17  # of a toy's tower: a class token and sixteen patches
CONFIG = QuantizationConfig(
    QuantSpec(4, "per_group", 32), QuantSpec(4, "per_channel"), QuantSpec(4, "per_position")
)


def quantizer(x: Tensor, **options: Any) -> PositionQuantizer:
    """That of samples [images, positions, features]."""
    spec = QuantSpec(4, "per_position", positions=x.shape[1], **options)
    found = activation_quantizer(x.flatten(0, 1), spec)
    assert isinstance(found, PositionQuantizer)
    return found


@pytest.fixture
def images() -> Tensor:
    """Tokens of images whose positions differ in range, [images, positions, features]."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(6, 5, 8, generator=random) * torch.tensor([9.0, 1, 0.1, 3, 1])[:, None]


def test_each_position_has_the_range_of_its_tokens_in_all_images(images: Tensor) -> None:
    found = quantizer(images, ranges="minmax")
    for position in range(5):
        seen = images[:, position]
        scale = (seen.max() - seen.min()) / 15
        zero = (-seen.min() / scale).round()
        steps = ((seen / scale).round() + zero).clamp(0, 15) - zero
        torch.testing.assert_close(found(images)[:, position], steps * scale)


def test_sequences_one_after_the_other_are_those_of_a_batch(images: Tensor) -> None:
    found, flat = quantizer(images), images.flatten(0, 1)
    assert torch.equal(found(flat), found(images).flatten(0, 1))
    codes = found.quantize(flat)
    assert torch.equal(codes, found.quantize(images).flatten(0, 1))
    assert torch.equal(found.dequantize(codes), found(flat))
    assert torch.equal(found.group_index(flat)[:, 0], torch.arange(5).repeat(6))


def test_another_number_of_positions_is_refused(images: Tensor) -> None:
    found = quantizer(images)
    for x in (images[:, :4], images[0, :4], images.flatten(0, 1)[:9]):
        with pytest.raises(UserError, match=r"ranges of 5 positions, and the input has \d\."):
            found(x)


def test_the_language_model_has_no_positions() -> None:
    with pytest.raises(UserError, match=r"is for the vision tower.*Give quantizer\.language"):
        QuantizationConfig(CONFIG.weight, QuantSpec(4, "per_position"), CONFIG.vision)


@pytest.mark.parametrize("method", [RTN, AWQ, GPTQ, SmoothQuant, RoCo])
def test_every_method_has_them_and_packs_them(method: type[Any]) -> None:
    model = toy_llava()
    expected = expected_layers(model, vision_tower=True)
    method().quantize(Walk(model, toy_batches(), CONFIG))
    found = [
        layer.input_quantizer
        for name, layer in model.named_modules()
        if isinstance(layer, QuantLinear) and "vision_tower" in name
    ]
    assert {type(each) for each in found} == {PositionQuantizer}
    assert {tuple(each.scale.shape) for each in found} == {(POSITIONS, 1)}
    assert check_bits(measure_bits(model, expected, toy_batches(), CONFIG)) == []
    compute_in_float64(model)  # and round each output once, as products of integers do
    expected_logits = logits(model)
    pack_model(model)
    packed = {n: layer for n, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    assert [layer.form.inputs for layer in packed.values()].count("position") == len(found) == 18
    torch.testing.assert_close(logits(model), expected_logits)
    for name, layer in packed.items():
        model.set_submodule(name, simulated(layer))
    compute_in_float64(model)
    assert torch.equal(logits(model), expected_logits)


def test_an_input_is_not_proven_by_another_position(images: Tensor) -> None:
    linear = nn.Linear(8, 3)
    assert quantizer(images).scale.shape == (5, 1)
    layer = QuantLinear.from_linear(
        linear, activation_quantizer(linear.weight, QuantSpec(8, "per_tensor")), quantizer(images)
    )
    with pytest.raises(UserError, match="ranges of 5 positions"):
        layer(images[:, :3])


def test_whole_images_are_calibrated_on() -> None:
    walk = Walk(toy_llava(), toy_batches(), CONFIG)
    block = next(iter(walk.blocks()))
    for samples in block.linear_inputs(max_tokens=2 * POSITIONS).values():
        assert len(samples) % POSITIONS == 0
    everything = block.linear_inputs(max_tokens=None)["self_attn.q_proj"]
    some = block.linear_inputs(max_tokens=1)["self_attn.q_proj"]
    assert len(some) == POSITIONS * len(block.inputs) < len(everything)
    assert torch.equal(some[:POSITIONS], everything[:POSITIONS])


def test_a_tower_that_reads_images_of_different_lengths_is_refused() -> None:
    walk = Walk(toy_llava(), toy_batches(), CONFIG)
    first = next(iter(walk.blocks()))
    (x, *more), kwargs = first.inputs[0]
    calls = [((x, *more), kwargs), ((x[:, 1:], *more), kwargs)]
    with pytest.raises(UserError, match="does not read as many tokens of every image"):
        type(first)({first.name: first.module}, "vision", calls, CONFIG, [])

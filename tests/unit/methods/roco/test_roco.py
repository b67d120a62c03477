"""RoCo: weights of tokens are the float model's probabilities, and they move the rounding."""

import json
from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn

from qvlm.errors import UserError
from qvlm.methods.roco.confidence import confidence
from qvlm.methods.roco.method import RoCo
from qvlm.methods.rotation.method import QuaRot
from qvlm.quantization.calibration import Walk
from qvlm.quantization.spec import QuantizationConfig, QuantSpec
from qvlm.quantization.verification import check_bits, expected_layers, measure_bits
from tests.helpers.toy import IMAGE_TOKEN, IMAGE_TOKENS, toy_batch, toy_batches, toy_llava

pytestmark = pytest.mark.instruction_set


def config() -> QuantizationConfig:
    return QuantizationConfig(
        QuantSpec(4, "per_group", 16),
        QuantSpec(4, "per_channel_group", 16),
        QuantSpec(4, "per_token"),
        False,
    )


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, use_cache=False).logits


def test_weights_are_probabilities_of_the_token_that_follows_plus_the_floor() -> None:
    model, batches = toy_llava(), toy_batches(3)
    found = confidence(model, batches, 0.1)
    assert len(found) == len(batches)
    for weights, batch in zip(found, batches, strict=True):
        ids = batch["input_ids"]
        probabilities = logits(model, batch).double().softmax(-1)
        for row in range(len(ids)):
            for place in range(ids.shape[1]):
                expected = 0.1
                last = place + 1 == ids.shape[1]
                if not last and ids[row, place + 1] != IMAGE_TOKEN:
                    expected += float(probabilities[row, place, ids[row, place + 1]])
                assert float(weights[row * ids.shape[1] + place]) == pytest.approx(expected, 1e-5)
    with_image = found[0].view(2, -1)
    assert torch.equal(
        with_image[:, : IMAGE_TOKENS - 1].unique(), torch.tensor([0.1], dtype=torch.float64)
    )


def test_a_model_that_is_sure_gives_weights_near_one() -> None:
    model, batch = toy_llava(), toy_batch(image=False, words=6)
    with torch.no_grad():
        model.lm_head.weight.mul_(400)
    said = logits(model, batch).argmax(-1)
    sure = {**batch, "input_ids": torch.cat([batch["input_ids"][:, :1], said[:, :1]], 1)}
    sure["attention_mask"] = torch.ones_like(sure["input_ids"])
    weights = confidence(model, [sure], 0.01)[0].view(2, 2)
    assert bool((weights[:, 0] > 0.9).all()) and weights[:, 1].tolist() == [0.01, 0.01]


def test_with_equal_weights_it_is_quarot() -> None:
    ours, theirs = toy_llava("routed"), toy_llava("routed")
    RoCo(floor=None).quantize(Walk(ours, toy_batches(), config()))
    QuaRot().quantize(Walk(theirs, toy_batches(), config()))
    assert torch.equal(logits(ours, toy_batch(seed=5)), logits(theirs, toy_batch(seed=5)))


def test_weights_change_codes_of_the_decoder_alone() -> None:
    models = []
    for floor in (None, 0.1):
        models.append(toy_llava("routed"))
        RoCo(floor=floor).quantize(Walk(models[-1], toy_batches(), config()))
    states = [model.state_dict() for model in models]
    different = {key for key in states[0] if not torch.equal(states[0][key], states[1][key])}
    assert any(".down_proj.weight" in key for key in different)
    assert any("experts" in key for key in different)
    assert not any("projector" in key for key in different)


def test_bits_are_proven_and_the_report_fits_into_json() -> None:
    model = toy_llava("routed")
    expected = expected_layers(model, vision_tower=False)
    report = RoCo(min_tokens=1).quantize(Walk(model, toy_batches(), config()))
    assert check_bits(measure_bits(model, expected, toy_batches(), config())) == []
    details = json.loads(json.dumps(asdict(report)))["details"]
    assert all("experts.2." in name for name in details["rounded_to_nearest"])
    assert len(details["layers"]) + len(details["rounded_to_nearest"]) == len(expected)


def test_it_can_be_streamed_without_weights() -> None:
    assert not RoCo().one_pass
    assert RoCo(floor=None).one_pass


@pytest.mark.parametrize("floor", [0, -1, "much"])
def test_a_wrong_floor_is_refused_by_name(floor: object) -> None:
    with pytest.raises(UserError, match=f"method.floor={floor}"):
        RoCo(floor=floor)

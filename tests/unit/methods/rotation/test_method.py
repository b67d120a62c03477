"""QuaRot: rotated, rounded, proven, packed, saved and loaded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qvlm.cell import inputs
from qvlm.errors import UserError
from qvlm.methods.rotation.method import QuaRot
from qvlm.methods.rtn import RTN
from qvlm.models import Llava
from qvlm.packing.checkpoint import load_packed, save_packed
from qvlm.packing.model import pack_model, packed_layers
from qvlm.packing.verification import measure_packed_bits
from qvlm.quantization.calibration import Walk, batch_by_length
from qvlm.quantization.linear import QuantLinear
from qvlm.quantization.spec import QuantizationConfig, QuantSpec
from qvlm.quantization.verification import check_bits, expected_layers, measure_bits
from tests.helpers.configs import load
from tests.helpers.standins import tiny
from tests.helpers.toy import toy_batch, toy_batches, toy_llava

pytestmark = pytest.mark.instruction_set


def config(
    bits: int = 4, language: str = "per_token", vision_tower: bool = False
) -> QuantizationConfig:
    return QuantizationConfig(
        QuantSpec(bits, "per_group", 16),
        QuantSpec(bits, language, 16),
        QuantSpec(bits, "per_token"),
        vision_tower,
    )


def words(rows: int, count: int, seed: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (rows, count), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor] | None = None) -> Tensor:
    return model(**(batch or toy_batch(seed=5)), use_cache=False).logits


def with_outliers(model: nn.Module) -> nn.Module:
    """Makes some channels of norms' outputs and of MLPs large, and what reads them small."""
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            for norm, readers in (
                (layer.input_layernorm, ("q_proj", "k_proj", "v_proj")),
                (layer.post_attention_layernorm, ("gate_proj", "up_proj")),
            ):
                norm.weight[3] *= 30
                for name, module in layer.named_modules():
                    if name.endswith(readers):
                        module.weight[:, 3] /= 30
            layer.mlp.up_proj.weight[5] *= 30
            layer.mlp.down_proj.weight[:, 5] /= 30
    return model


@pytest.mark.parametrize("language", ["per_token", "per_tensor"])
@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_a_model_with_outliers_is_closer_than_with_rtn(rounding: str, language: str) -> None:
    exact = logits(toy_llava())
    assert torch.allclose(logits(with_outliers(toy_llava())), exact, atol=1e-4)
    errors = []
    for method in (QuaRot(rounding), RTN()):
        model = with_outliers(toy_llava())
        method.quantize(Walk(model, toy_batches(), config(4, language)))
        errors.append(float((logits(model) - exact).norm() / exact.norm()))
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("text", ["llama", "routed", "mixtral"])
def test_the_bits_are_proven(text: str) -> None:
    model = toy_llava(text)
    expected = expected_layers(model, vision_tower=True)
    quantization = config(4, "per_channel_group", vision_tower=True)
    QuaRot("nearest", vision=True, online=["o_proj", "down_proj"]).quantize(
        Walk(model, toy_batches(), quantization)
    )
    rows = measure_bits(model, expected, toy_batches(), quantization)
    assert len(rows) == len(expected) and check_bits(rows) == []
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            named = name.endswith(("o_proj", "down_proj")) or "vision_tower" in name
            assert layer.hadamard == named, name


def test_more_bits_are_closer_to_full_precision() -> None:
    """At 8 bits hardly anything is left: what was rotated computes what it did."""
    exact, errors = logits(toy_llava("routed")), []
    for bits in (3, 4, 8):
        model = toy_llava("routed")
        QuaRot("nearest").quantize(Walk(model, toy_batches(), config(bits)))
        errors.append(float((logits(model) - exact).norm() / exact.norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.03 < errors[0]


@pytest.mark.parametrize("family", ["llava", "moe_llava", "moe_llava_phi2", "moe_llava_qwen"])
def test_a_packed_model_is_saved_and_loaded(family: str, tmp_path: Path) -> None:
    """Biases that a shift of a norm left in linears, routers and the head are kept."""
    model = tiny(family).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.bias.normal_()
    batches, proof = [words(2, 6, seed) for seed in (0, 1)], words(3, 7, 5)
    quantization = QuantizationConfig(
        QuantSpec(4, "per_group", 8),
        QuantSpec(4, "per_token"),
        QuantSpec(4, "per_token"),
        vision_tower=False,
    )
    expected = expected_layers(model, vision_tower=False)
    QuaRot(min_tokens=1).quantize(Walk(model, batches, quantization))
    simulated = logits(model, proof)
    pack_model(model)
    packed = logits(model, proof)
    assert float((packed - simulated).abs().max()) < 1e-4 * float(simulated.abs().max())
    assert check_bits(measure_packed_bits(model, expected, [proof])) == []
    save_packed(model, tmp_path)
    loaded = load_packed(Llava, tmp_path)
    assert torch.equal(logits(loaded, proof), packed)
    assert {n for n, layer in packed_layers(loaded).items() if layer.form.hadamard} == {
        name for name in expected if name.endswith(("down_proj", "fc2")) and "layers" in name
    }


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mini_llava", "mini_moe_llava"])
@torch.no_grad()
def test_a_packed_miniature_says_what_the_simulated_one_says(model: str) -> None:
    """Miniatures are in float64, where packed and simulated products have the same sums."""
    settings = load(f"model={model}", "calibration.samples=4", "evaluation.limit=6")
    loaded = inputs.load(settings, "cpu")
    samples, _ = inputs.draw_calibration(settings)
    batches = batch_by_length(loaded, samples, 4)
    QuaRot("nearest").quantize(Walk(loaded.model, batches, inputs.quantization_config(settings)))
    problems = inputs.load_problems(settings)
    proof = [loaded.encode([problem], with_target=True) for problem in problems]
    simulated = [logits(loaded.model, batch) for batch in proof]
    pack_model(loaded.model)
    for batch, expected in zip(proof, simulated, strict=True):
        packed = logits(loaded.model, batch)
        assert torch.equal(packed.argmax(-1), expected.argmax(-1))
        assert float((packed - expected).abs().max()) < 1e-9 * float(expected.abs().max())


def test_signs_follow_the_seed() -> None:
    def codes(seed: int) -> Tensor:
        model = toy_llava()
        QuaRot("nearest", seed=seed).quantize(Walk(model, toy_batches(), config()))
        layer = model.get_submodule("model.language_model.layers.0.self_attn.q_proj")
        assert isinstance(layer, QuantLinear)
        return layer.weight_codes()

    assert torch.equal(codes(0), codes(0))
    assert not torch.equal(codes(0), codes(1))


def test_parts_can_be_left_out() -> None:
    model, plain = toy_llava(), toy_llava()
    QuaRot("nearest", stream=False, heads=False, online=()).quantize(
        Walk(model, toy_batches(), config())
    )
    RTN().quantize(Walk(plain, toy_batches(), config()))
    assert torch.equal(logits(model), logits(plain))
    heads = toy_llava()
    QuaRot("nearest", stream=False, online=()).quantize(Walk(heads, toy_batches(), config()))
    assert not torch.equal(logits(heads), logits(plain))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rounding": "up"}, "method.rounding=up"),
        ({"stream": "no"}, "method.stream=no"),
        ({"online": ["gate_proj"]}, "method.online=gate_proj"),
        ({"seed": -1}, "method.seed=-1"),
        ({"damping": -1}, "method.damping=-1"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        QuaRot(**options)


def test_a_layer_without_the_linear_is_refused() -> None:
    """Otherwise nothing would be transformed, and no one would be told."""
    block: Any = SimpleNamespace(
        kind="language", name="layers.0", linears={"mlp.wo": 0, "a.dense": 1}
    )
    rotations = QuaRot(online=["o_proj"]).rotations
    assert rotations.transforming(block) == {"a.dense"}
    with pytest.raises(
        UserError, match="online=down_proj is no linear of layers.0, which has dense, wo"
    ):
        QuaRot().rotations.transforming(block)

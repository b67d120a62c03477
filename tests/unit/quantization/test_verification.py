"""The proof of bits: what it must accept and, above all, what it must refuse."""

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvlm.errors import UserError
from qvlm.methods import RTN
from qvlm.quantization.calibration import Walk
from qvlm.quantization.linear import QuantLinear
from qvlm.quantization.quantizer import Quantizer, TokenQuantizer, UniformQuantizer
from qvlm.quantization.ranges import weight_quantizer
from qvlm.quantization.spec import QuantizationConfig, QuantSpec
from qvlm.quantization.verification import LayerBits, check_bits, expected_layers, measure_bits
from tests.helpers.toy import toy_batch, toy_batches, toy_llava

pytestmark = pytest.mark.instruction_set

W4A4 = QuantizationConfig(
    QuantSpec(4, "per_channel"), QuantSpec(4, "per_channel_group", 16), QuantSpec(4, "per_token")
)
# Scales so small that counting values says nothing: 32 features and 8 weights against 256 levels.
W8A8 = QuantizationConfig(
    QuantSpec(8, "per_group", 8), QuantSpec(8, "per_token"), QuantSpec(8, "per_token")
)
FOLDED = QuantizationConfig(
    QuantSpec(3, "per_channel"), QuantSpec(6, "per_channel"), QuantSpec(6, "per_tensor")
)
DOWN = "model.language_model.layers.1.mlp.down_proj"


@cache
def _quantized(config: QuantizationConfig, text: str) -> tuple[nn.Module, list[str]]:
    model = toy_llava(text)
    expected = expected_layers(model, config.vision_tower)
    RTN().quantize(Walk(model, toy_batches(), config))
    return model, expected


def quantized(config: QuantizationConfig, text: str = "llama") -> tuple[nn.Module, list[str]]:
    """A copy of a model after RTN, and the layers that must be quantized."""
    model, expected = _quantized(config, text)
    return copy.deepcopy(model), expected


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def refused(model: nn.Module, expected: list[str], config: QuantizationConfig) -> list[str]:
    return check_bits(measure_bits(model, expected, [toy_batch(seed=7)], config))


def test_expected_layers_are_all_linears_but_routers_and_head() -> None:
    model = toy_llava("routed")
    names = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "router" not in name and "lm_head" not in name
    }
    expected = expected_layers(model, vision_tower=True)
    assert set(expected) == names and len(expected) == len(names)
    language = expected_layers(model, vision_tower=False)
    assert language == [name for name in expected if "vision_tower" not in name]


def test_fused_experts_are_expected_by_the_names_they_get() -> None:
    model = toy_llava("mixtral")
    expected = expected_layers(model, vision_tower=True)
    assert "model.language_model.layers.1.mlp.experts.3.down_proj" in expected
    Walk(model, toy_batches(), W4A4)  # takes them apart
    assert sorted(expected_layers(model, vision_tower=True)) == sorted(expected)


def test_a_matrix_that_nothing_would_quantize_is_refused() -> None:
    model = toy_llava()
    layer = model.get_submodule("model.language_model.layers.1.mlp")
    layer.register_parameter("input_linear", nn.Parameter(torch.zeros(4, 8, 32)))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.input_linear .*floating point"):
        expected_layers(model, vision_tower=True)


@pytest.mark.parametrize("config", [W4A4, W8A8, FOLDED])
@pytest.mark.parametrize("text", ["llama", "routed", "mixtral"])
def test_a_quantized_model_is_proven(config: QuantizationConfig, text: str) -> None:
    model, expected = quantized(config, text)
    rows = measure_bits(model, expected, [toy_batch(seed=7)], config)
    assert [row.layer for row in rows] == expected and check_bits(rows) == []
    for row in rows:
        vision = "vision_tower" in row.layer
        assert row.a_bits == (config.vision if vision else config.language).bits
        assert row.w_bits == config.weight.bits
    # The counts are real: some layer uses (nearly) all its levels.
    assert max(row.weight_levels for row in rows) > min(8, 2**config.weight.bits) / 2
    assert max(row.input_levels for row in rows) > 2**config.language.bits / 2
    probed = {row.layer for row in rows if row.probed}
    unseen = {name for name in expected if "layers.0.mlp.experts.2." in name}
    assert probed >= (unseen if text == "routed" else set())
    assert all("experts" in name for name in probed)


def test_levels_are_those_of_the_tensors_in_the_product() -> None:
    model, expected = quantized(FOLDED)
    batches = [toy_batch(seed=7), toy_batch(seed=8, image=False)]
    layer = model.get_submodule(DOWN)
    assert isinstance(layer, QuantLinear) and isinstance(layer.input_quantizer, UniformQuantizer)
    inputs: list[Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    row = next(row for row in measure_bits(model, expected, batches, FOLDED) if row.layer == DOWN)
    most = 0
    for x in inputs:
        steps = layer.input_quantizer.centered(x.flatten(0, 1))
        most = max(most, *(len(set(channel.tolist())) for channel in steps.T))
    assert len(inputs) == 2 and row.input_levels == most
    assert row.weight_levels == max(len(set(out.tolist())) for out in layer.quantized_weight())


@pytest.mark.parametrize("config", [W4A4, W8A8, FOLDED])
@pytest.mark.parametrize("name", [DOWN, "model.vision_tower.encoder.layers.1.self_attn.q_proj"])
def test_a_layer_left_in_floating_point_is_refused(config: QuantizationConfig, name: str) -> None:
    model, expected = quantized(config)
    layer = model.get_submodule(name)
    replace(model, name, nn.Linear(layer.in_features, layer.out_features))
    assert refused(model, expected, config) == [name]


def float_input(model: nn.Module, name: str) -> None:
    layer = model.get_submodule(name)
    assert isinstance(layer, QuantLinear)
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias)  # type: ignore[method-assign]


def identity_quantizer(model: nn.Module, name: str) -> None:
    layer = model.get_submodule(name)
    layer.input_quantizer = nn.Identity()


def quantizer_that_passes_through(model: nn.Module, name: str) -> None:
    quantizer = model.get_submodule(name).input_quantizer
    quantizer.forward = lambda x: x.float()
    quantizer.centered = lambda x: x.float()


def float_weight(model: nn.Module, name: str) -> None:
    layer = model.get_submodule(name)
    layer.weight = layer.weight + 1e-3 * torch.randn_like(layer.weight)


TAMPERING = [float_input, identity_quantizer, quantizer_that_passes_through, float_weight]


@pytest.mark.parametrize("tamper", TAMPERING)
@pytest.mark.parametrize("config", [W4A4, W8A8, FOLDED])
def test_a_layer_that_only_looks_quantized_is_refused(
    config: QuantizationConfig, tamper: Callable[[nn.Module, str], None]
) -> None:
    model, expected = quantized(config)
    tamper(model, DOWN)
    assert refused(model, expected, config) == [DOWN]


def test_more_bits_than_claimed_are_refused() -> None:
    for config in (W4A4, FOLDED):
        for finer in ("input", "weight"):
            model, expected = quantized(config)
            layer = model.get_submodule(DOWN)
            inputs: Quantizer = TokenQuantizer(config.language.bits + (finer == "input"))
            weight = torch.randn(layer.out_features, layer.in_features)
            bits = config.weight.bits + (finer == "weight")
            weights = weight_quantizer(weight, QuantSpec(bits, "per_channel"))
            replace(model, DOWN, QuantLinear(weights(weight), None, weights, inputs, DOWN))
            assert refused(model, expected, config) == [DOWN]


def test_an_expert_that_is_float_is_refused_though_no_token_reaches_it() -> None:
    model, expected = quantized(W4A4, "routed")
    name = "model.language_model.layers.0.mlp.experts.2.up_proj"
    replace(model, name, nn.Linear(32, 64))
    rows = measure_bits(model, expected, [toy_batch(seed=7)], W4A4)
    assert check_bits(rows) == [name]
    assert next(row for row in rows if row.layer == name).probed


def test_vision_layers_are_probed_where_no_batch_has_an_image() -> None:
    model, expected = quantized(W4A4)
    rows = measure_bits(model, expected, [toy_batch(image=False)], W4A4)
    assert check_bits(rows) == []
    image_side = ("vision_tower", "multi_modal_projector")
    assert {row.layer for row in rows if row.probed} == {
        name for name in expected if any(part in name for part in image_side)
    }


def test_a_layer_that_is_gone_or_multiplies_elsewhere_is_refused() -> None:
    class Elsewhere(nn.Module):
        def __init__(self, layer: QuantLinear) -> None:
            super().__init__()
            self.in_features, self.inner = layer.in_features, [layer]

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.inner[0].quantized_weight().T

    model, expected = quantized(W4A4)
    layer = model.get_submodule(DOWN)
    assert isinstance(layer, QuantLinear)
    wrapper = Elsewhere(layer)
    wrapper.register_buffer("anchor", torch.zeros(1))
    replace(model, DOWN, wrapper)
    rows = measure_bits(model, [*expected, "model.gone"], [toy_batch()], W4A4)
    assert check_bits(rows) == [DOWN, "model.gone"]
    assert rows[-1] == LayerBits("model.gone", 4, 4, 0, 0)


def test_a_codebook_is_proven_by_its_own_codes() -> None:
    class Levels(Quantizer):
        """Four uneven levels times one scale for every eight weights."""

        def __init__(self, weight: Tensor) -> None:
            super().__init__(2)
            self.levels = torch.tensor([-1.0, -0.2, 0.1, 1.0])
            self.scale = weight.view(-1, 8).abs().amax(1, keepdim=True)

        def quantize(self, x: Tensor) -> Tensor:
            distance = (x.reshape(-1, 8, 1) / self.scale[..., None] - self.levels).abs()
            return distance.argmin(-1).to(torch.uint8).view(x.shape)

        def dequantize(self, codes: Tensor) -> Tensor:
            values = self.levels[codes.long()].reshape(-1, 8) * self.scale
            return values.view(codes.shape)

        def group_index(self, x: Tensor) -> Tensor:
            return torch.arange(x.numel()).view(x.shape) // 8

    config = QuantizationConfig(QuantSpec(2, "per_channel"), W4A4.language, W4A4.vision)
    model = toy_llava()
    expected = expected_layers(model, True)
    for block in Walk(model, toy_batches(), config).blocks():
        for name, samples in block.linear_inputs().items():
            block.replace(name, block.quantize_linear(name, samples, weights=Levels))
    assert refused(model, expected, config) == []
    float_weight(model, DOWN)
    assert refused(model, expected, config) == [DOWN]


def test_rows_out_of_bounds_are_named() -> None:
    rows = [
        LayerBits("sound", 4, 8, 16, 256),
        LayerBits("weight", 4, 8, 17, 256),
        LayerBits("input", 4, 8, 16, 257),
        LayerBits("never", 4, 8, 0, 0),
    ]
    assert check_bits(rows) == ["weight", "input", "never"]


def test_measuring_leaves_the_model_as_it_was() -> None:
    model, expected = quantized(W4A4)
    before = model(**toy_batch()).logits
    measure_bits(model, expected, [toy_batch()], W4A4)
    assert torch.equal(model(**toy_batch()).logits, before)
    modules = [model.get_submodule(name) for name in expected]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules)

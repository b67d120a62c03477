"""AWQ: folding keeps the function, choices are what brute force finds, and never lose to RTN."""

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig

from qvlm.errors import RunError, UserError
from qvlm.methods.awq.clipping import clipped_quantizer
from qvlm.methods.awq.method import AWQ
from qvlm.methods.awq.rescaling import Rescaling, find_rescalings
from qvlm.methods.awq.search import ChosenScale, ScaleSearch, channel_scale
from qvlm.methods.base import MethodReport
from qvlm.methods.rtn import RTN
from qvlm.models import Llava, LlavaArchitecture, MoeStableLmConfig
from qvlm.quantization.block import Block
from qvlm.quantization.calibration import Walk
from qvlm.quantization.linear import QuantLinear
from qvlm.quantization.quantizer import UniformQuantizer
from qvlm.quantization.ranges import activation_quantizer, minmax, weight_quantizer
from qvlm.quantization.spec import QuantizationConfig, QuantSpec
from qvlm.quantization.verification import check_bits, expected_layers, measure_bits
from tests.helpers.toy import (
    IMAGE_SIZE,
    IMAGE_TOKEN,
    VOCABULARY,
    WIDTH,
    toy_batch,
    toy_batches,
    toy_llava,
)

pytestmark = [pytest.mark.instruction_set, pytest.mark.slow]

FAMILIES = ("llama", "routed", "mixtral", "moe_stablelm")
DECODER = "model.language_model.layers"


def config(
    bits: int = 4, language: str = "per_channel_group", weight: str = "per_group"
) -> QuantizationConfig:
    return QuantizationConfig(
        QuantSpec(bits, weight, 16), QuantSpec(bits, language, 16), QuantSpec(bits, "per_token")
    )


def build(family: str) -> nn.Module:
    """A toy whose norms are far from one and whose inner channels differ, so that scales matter."""
    if family == "moe_stablelm":
        torch.manual_seed(0)
        sizes = {
            "hidden_size": WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        text = MoeStableLmConfig(
            vocab_size=VOCABULARY, num_key_value_heads=4, initializer_range=0.1, **sizes
        )
        vision = CLIPVisionConfig(image_size=IMAGE_SIZE, patch_size=8, **sizes)
        model = Llava(
            LlavaArchitecture(
                vision_config=vision,
                text_config=text,
                image_token_id=IMAGE_TOKEN,
                vision_feature_layer=-2,
                vision_feature_select_strategy="default",
            )
        ).eval()
    else:
        model = toy_llava(family, vision_layers=2)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name:
                spread = torch.randn(parameter.shape, generator=random)
                parameter.copy_(spread.exp() if name.endswith("weight") else 0.3 * spread)
            elif name.endswith("v_proj.weight"):
                parameter.mul_(torch.randn(len(parameter), 1, generator=random).exp())
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**toy_batch(seed=5)).logits


def run(
    family: str = "llama", quantization: QuantizationConfig | None = None, **parameters: object
) -> tuple[nn.Module, MethodReport]:
    model = build(family)
    walk = Walk(model, toy_batches(2), quantization or config())
    return model, AWQ(**parameters).quantize(walk)


# --- folding --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_any_scale_leaves_the_logits_unchanged(family: str) -> None:
    model = build(family)
    before = logits(model)
    walk = Walk(model, toy_batches(2), config())
    sources: dict[str, list[str]] = {}
    for block in walk.blocks():
        for rescaling in find_rescalings(block):
            random = torch.Generator().manual_seed(rescaling.width)
            rescaling.apply(block.module, torch.randn(rescaling.width, generator=random).exp())
            sources.setdefault(block.kind, []).append(rescaling.source)
    difference = (logits(model) - before).abs().max()
    assert difference < 1e-5 * before.abs().max()
    assert sources["vision"] == ["layer_norm1", "self_attn.v_proj", "layer_norm2"] * 2
    assert "projector" not in sources  # no norm in front, an activation function inside
    # Query heads that share a value head leave no place behind v_proj.
    attention = ["input_layernorm", "self_attn.v_proj"]
    attention = attention if family == "moe_stablelm" else attention[:1]
    count = {"llama": 0, "routed": 3, "mixtral": 4, "moe_stablelm": 4}[family]
    ups = [f"mlp.experts.{expert}.up_proj" for expert in range(count)]
    layers = [
        [*attention, "post_attention_layernorm", *(experts or ["mlp.up_proj"])]
        for experts in (ups, ups if family == "mixtral" else [])
    ]
    assert sorted(sources["language"]) == sorted(layers[0] + layers[1])


@pytest.mark.parametrize("family", ["routed", "mixtral", "moe_stablelm"])
def test_a_norm_before_a_mixture_is_folded_into_router_and_every_expert(family: str) -> None:
    block = list_of_blocks(family)[0]
    rescaling = next(f for f in block[1] if f.source == "post_attention_layernorm")
    experts = sorted({name.split(".")[2] for name in rescaling.readers})
    assert experts == [str(i) for i in range(3 if family == "routed" else 4)]
    assert len(rescaling.readers) == 2 * len(experts)
    assert rescaling.routers == ("mlp.gate" if family == "mixtral" else "mlp.router",)


def list_of_blocks(family: str) -> list[tuple[str, list[Rescaling]]]:
    walk = Walk(build(family), toy_batches(2), config())
    return [(b.name, find_rescalings(b)) for b in walk.blocks() if b.kind == "language"]


def test_an_expert_without_a_token_is_folded_too() -> None:
    model = build("routed")
    layer = model.get_submodule(f"{DECODER}.0")
    x = torch.randn(7, WIDTH)

    def unreached() -> Tensor:
        with torch.no_grad():
            return layer.mlp.experts[2](layer.post_attention_layernorm(x))

    before = unreached()
    for block in Walk(model, toy_batches(2), config()).blocks():
        for rescaling in find_rescalings(block):
            rescaling.apply(block.module, torch.linspace(0.2, 3, rescaling.width))
    torch.testing.assert_close(unreached(), before, rtol=1e-4, atol=1e-5)


class OneMore(nn.Module):
    """A norm that adds one to its weight, as some families have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:]) * (1 + self.weight)


class Activated(nn.Module):
    """An MLP with an activation function where a gated one has none."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, 2 * width)
        self.down_proj = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


def test_a_place_that_would_change_the_function_is_left_out() -> None:
    model = build("llama")
    layers = model.get_submodule(DECODER)
    layers[0].input_layernorm = OneMore(WIDTH)
    layers[0].mlp = Activated(WIDTH)
    before = copy.deepcopy(model.state_dict())
    blocks = iter(Walk(model, toy_batches(2), config()).blocks())
    block = next(b for b in blocks if b.name == f"{DECODER}.0")
    assert [rescaling.source for rescaling in find_rescalings(block)] == [
        "post_attention_layernorm"
    ]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Unrounded(AWQ):
    """Keeps each folded float linear by the name of its layer."""

    def __init__(self) -> None:
        super().__init__(n_grid=3, fallback=False)
        self.linears: dict[str, nn.Linear] = {}

    def quantize_linear(
        self, block: Block, name: str, samples: Tensor, scale: Tensor | None
    ) -> QuantLinear:
        self.linears[block.layer_name(name)] = block.linears[name]
        return super().quantize_linear(block, name, samples, scale)


@pytest.mark.parametrize("family", ["llama", "moe_stablelm"])
def test_without_the_rounding_awq_leaves_the_logits_unchanged(family: str) -> None:
    model = build(family)
    before, norms = logits(model), copy.deepcopy(model.state_dict())
    method = Unrounded()
    method.quantize(Walk(model, toy_batches(2), config()))
    for name, linear in method.linears.items():
        model.set_submodule(name, linear)
    after = model.state_dict()
    folded = [key for key in norms if "norm" in key and not torch.equal(norms[key], after[key])]
    assert folded  # scales other than one were chosen
    assert (logits(model) - before).abs().max() < 1e-5 * before.abs().max()


# --- the search -----------------------------------------------------------------------------


def mean_squared(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    pairs = zip(ours, exact, strict=True)
    total = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return total / sum(b.numel() for b in exact)


class Watched(Walk):
    """Compares each block that a method leaves with RTN's of the same inputs."""

    def blocks(self, partition: Sequence[Sequence[str]] | None = None) -> Iterator[Block]:
        self.errors: list[tuple[float, float]] = []
        for block in super().blocks(partition):
            exact = block.run()
            rtn = copy.deepcopy(block.module)
            for name, samples in block.linear_inputs().items():
                rtn.set_submodule(name, block.quantize_linear(name, samples))
            rtn_error = mean_squared(block.run(rtn), exact)
            yield block
            self.errors.append((mean_squared(block.run(), exact), rtn_error))


@pytest.mark.parametrize(
    ("family", "scaling", "search_activations"),
    [
        ("llama", "folded", False),
        ("mixtral", "weight_only", False),
        ("routed", "weight_only", True),
        ("moe_stablelm", "folded", True),
    ],
)
def test_no_block_is_worse_than_rtn(family: str, scaling: str, search_activations: bool) -> None:
    walk = Watched(build(family), toy_batches(2), config(3))
    report = AWQ(scaling, n_grid=4, search_activations=search_activations).quantize(walk)
    assert len(walk.errors) == len(walk.names)
    for (error, rtn_error), block in zip(walk.errors, report.details["blocks"], strict=True):
        assert error <= rtn_error * (1 + 1e-6)
        assert block["rtn_error"] == pytest.approx(rtn_error, rel=1e-5)
        for choice in block["scales"].values():
            assert choice["error"] <= choice["rtn_error"]
    gains = [error / rtn_error for error, rtn_error in walk.errors]
    assert min(gains) < 0.9


class AbsurdSearch(ScaleSearch):
    """Chooses scales that no search would."""

    def choose(self, block: Block, rescaling: Rescaling, samples: dict[str, Tensor]) -> ChosenScale:
        return ChosenScale(rescaling, 1.0, torch.logspace(-6, 6, rescaling.width), 0.0, 0.0)


def absurd_awq(fallback: bool = True) -> AWQ:
    method = AWQ(max_shrink=0, fallback=fallback)
    method.search = AbsurdSearch([0.0], folded=True, quantize_inputs=False)
    return method


def test_a_block_that_loses_to_rtn_becomes_rtns() -> None:
    ours, theirs = build("moe_stablelm"), build("moe_stablelm")
    report = absurd_awq().quantize(Walk(ours, toy_batches(2), config()))
    kept = {block["block"]: block["kept"] for block in report.details["blocks"]}
    assert kept.pop("model.multi_modal_projector") == "AWQ"  # nothing to scale
    assert set(kept.values()) == {"RTN"}
    RTN().quantize(Walk(theirs, toy_batches(2), config()))
    one, two = ours.state_dict(), theirs.state_dict()
    assert all(torch.equal(one[key], two[key]) for key in two)
    absurd = build("moe_stablelm")
    absurd_awq(fallback=False).quantize(Walk(absurd, toy_batches(2), config()))
    assert not torch.equal(logits(absurd), logits(theirs))


@pytest.mark.parametrize("search_activations", [False, True])
@pytest.mark.parametrize("scaling", ["folded", "weight_only"])
def test_alpha_is_that_of_brute_force(scaling: str, search_activations: bool) -> None:
    """Equation 4 for the linear behind up_proj, written out in double precision."""
    place, name = "mlp.up_proj", "mlp.down_proj"
    spec = config(3)
    model = build("llama")
    walk = Walk(model, toy_batches(2), spec)
    block = next(block for block in walk.blocks() if block.kind == "language")
    x, weight = block.linear_inputs()[name], block.linears[name].weight.detach()
    errors = {}
    for step in range(9):
        s = x.abs().mean(0).clamp_min(1e-4) ** (step / 8)
        s = s / (s.max() * s.min()).sqrt()
        inside = x / s
        inputs = block.input_quantizer(name, inside if scaling == "folded" else x)
        w_hat = weight_quantizer(weight * s, spec.weight, inputs=inputs)(weight * s).double()
        if search_activations:
            seen = inside if scaling == "folded" else x
            x_hat = inputs(seen)
            inside = x_hat if scaling == "folded" else x_hat / s
        out = inside.double() @ w_hat.T
        errors[step / 8] = float((out - x.double() @ weight.double().T).square().mean())
    method = AWQ(scaling, n_grid=9, search_activations=search_activations)
    rescaling = next(rescaling for rescaling in find_rescalings(block) if rescaling.source == place)
    choice = method.search.choose(block, rescaling, block.linear_inputs())
    assert choice.alpha == min(errors, key=lambda alpha: errors[alpha])
    assert choice.error == pytest.approx(min(errors.values()), rel=1e-4)
    assert choice.rtn_error == pytest.approx(errors[0.0], rel=1e-4)


@pytest.mark.parametrize("family", ["routed", "mixtral", "moe_stablelm"])
def test_the_scale_of_a_mixture_is_that_of_brute_force(family: str) -> None:
    """Equation 4 for all gate and up projections of a mixture, on the output of the mixture."""
    spec = config(3)
    walk = Walk(build(family), toy_batches(2), spec)
    block = next(block for block in walk.blocks() if block.kind == "language")
    samples = block.linear_inputs()
    rescaling = next(
        found for found in find_rescalings(block) if found.source == "post_attention_layernorm"
    )
    mixture = block.module.get_submodule("mlp")
    calls: list[tuple[Tensor, ...]] = []
    handle = mixture.register_forward_pre_hook(lambda module, args: calls.append(args))
    exact = block.run()
    handle.remove()
    outputs = [mixture(*args) for args in calls]
    exact = [output[0] if isinstance(output, tuple) else output for output in outputs]
    activity = torch.cat([samples[name] for name in rescaling.readers]).abs().mean(0)
    errors = {}
    for step in range(5):
        s = activity.clamp_min(1e-4) ** (step / 4)
        s = s / (s.max() * s.min()).sqrt()
        rounded = copy.deepcopy(mixture)
        for name in rescaling.readers:
            linear = rounded.get_submodule(name.removeprefix("mlp."))
            inputs = block.input_quantizer(name, samples[name] / s, minmax)
            quantizer = weight_quantizer(linear.weight * s, spec.weight, inputs=inputs)
            linear.weight.data = quantizer(linear.weight * s) / s
        outputs = [rounded(*args) for args in calls]
        ours = [output[0] if isinstance(output, tuple) else output for output in outputs]
        errors[step / 4] = mean_squared(ours, exact)
    chosen = AWQ(n_grid=5).search.choose(block, rescaling, samples)
    assert chosen.alpha == min(errors, key=lambda alpha: errors[alpha])
    assert chosen.error == pytest.approx(min(errors.values()), rel=1e-4)
    assert chosen.rtn_error == pytest.approx(errors[0.0], rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scaling", ["folded", "weight_only"])
def test_no_search_of_a_quantized_layer_finds_an_error_of_zero(family: str, scaling: str) -> None:
    _, report = run(family, scaling=scaling, n_grid=3)
    for block in report.details["blocks"]:
        assert block["error"] > 0 and block["rtn_error"] > 0
        for choice in block["scales"].values():
            assert choice["error"] > 0 and choice["rtn_error"] > 0


def test_blocks_without_data_get_plain_rounding_and_say_so() -> None:
    batches = toy_batches(2, image=False)
    ours, theirs = build("llama"), build("llama")
    report = AWQ(n_grid=3).quantize(Walk(ours, batches, config()))
    RTN().quantize(Walk(theirs, batches, config()))
    for block in report.details["blocks"]:
        without = "layers" not in block["block"] or "vision_tower" in block["block"]
        assert (block["error"] is None) == (block["rtn_error"] is None) == without
        assert (block["kept"], block["scales"]) == ("RTN", {}) or not without
    tower = {key: value for key, value in ours.state_dict().items() if "vision_tower" in key}
    assert tower and all(
        torch.equal(theirs.state_dict()[key], value) for key, value in tower.items()
    )


def test_scale_is_the_papers_and_one_for_alpha_zero() -> None:
    activity = torch.tensor([0.01, 1.0, 100.0, 0.0])
    assert torch.equal(channel_scale(activity, 0.0), torch.ones(4))
    full = channel_scale(activity, 1.0)
    torch.testing.assert_close(full, torch.tensor([0.1, 10.0, 1000.0, 1e-3]))
    torch.testing.assert_close(channel_scale(activity, 0.5), full.sqrt())


def test_weights_of_loud_channels_are_protected() -> None:
    """With a few inputs far larger than the rest, scaling takes most of RTN's error away."""
    model = build("llama")
    norm = model.get_submodule(f"{DECODER}.0.post_attention_layernorm")
    with torch.no_grad():
        norm.weight.fill_(0.1)
        norm.weight[::16] = 20.0
    weights = QuantSpec(4, "per_group", 16, ranges="minmax")
    weight_only_bits = QuantizationConfig(
        weights, QuantSpec(8, "per_token"), QuantSpec(8, "per_token")
    )
    walk = Walk(model, toy_batches(1), weight_only_bits)
    report = AWQ(max_shrink=0).quantize(walk)
    block = next(b for b in report.details["blocks"] if b["block"] == f"{DECODER}.0")
    choice = block["scales"]["post_attention_layernorm"]
    assert choice["alpha"] > 0.2
    assert choice["error"] < 0.5 * choice["rtn_error"]


# --- clipping -------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["per_group", "per_channel", "per_tensor"])
def test_clipping_is_that_of_brute_force(granularity: str) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(6, 16).pow(3), torch.randn(50, 16) * torch.logspace(-1, 1, 16)
    spec = QuantSpec(3, granularity, 4)
    ratios = [1 - step / 20 for step in range(12)]
    size = 4 if granularity == "per_group" else 16
    rows = 6 if granularity == "per_tensor" else 1
    found = clipped_quantizer(weight, x, spec, ratios)
    default = weight_quantizer(weight, spec)
    best = torch.empty_like(weight)
    for top in range(0, 6, rows):
        for left in range(0, 16, size):
            part = slice(top, top + rows), slice(left, left + size)
            own = QuantSpec(3, "per_tensor")
            options = [default(weight)[part]]
            for ratio in ratios:
                lo, hi = minmax(weight[part].reshape(1, -1), own)
                grid = UniformQuantizer.from_range(lo[0] * ratio, hi[0] * ratio, 3)
                options.append(grid(weight[part]))
            losses = [
                float((x[:, part[1]].double() @ (w - weight[part]).double().T).square().sum())
                for w in options
            ]
            best[part] = options[losses.index(min(losses))]
    if granularity == "per_group":
        whole = [(x @ (w - weight).T).square().sum(0) for w in (best, default(weight))]
        best = torch.where((whole[0] <= whole[1])[:, None], best, default(weight))
    torch.testing.assert_close(found(weight), best)
    assert not torch.equal(found(weight), default(weight))


@pytest.mark.parametrize("granularity", ["per_group", "per_channel", "per_tensor"])
def test_clipping_never_raises_the_error_of_the_output(granularity: str) -> None:
    spec = QuantSpec(4, granularity, 8)
    for seed in range(5):
        torch.manual_seed(seed)
        weight, x = torch.randn(20, 32), torch.randn(200, 1) + 0.3 * torch.randn(200, 32)
        found = clipped_quantizer(weight, x, spec, [1 - step / 20 for step in range(10)])
        default = weight_quantizer(weight, spec)
        ours, plain = (float((x @ (q(weight) - weight).T).norm()) for q in (found, default))
        assert ours <= plain * (1 + 1e-5)
    none = clipped_quantizer(weight, x, spec, [])
    assert torch.equal(none.scale, default.scale)


def test_query_and_key_are_not_clipped() -> None:
    """Scaling off: they are RTN's, and others are not."""
    model, _ = run(n_grid=1, fallback=False)
    rtn = build("llama")
    RTN().quantize(Walk(rtn, toy_batches(2), config()))
    first = "model.vision_tower.encoder.layers.0"  # before inputs differ
    for name, equal in (("q_proj", True), ("k_proj", True), ("v_proj", False)):
        ours, theirs = (m.get_submodule(f"{first}.self_attn.{name}") for m in (model, rtn))
        assert torch.equal(ours.weight, theirs.weight) == equal


# --- the whole ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "language", "weight", "scaling"),
    [
        ("mixtral", "per_channel_group", "per_group", "folded"),
        ("moe_stablelm", "per_channel", "per_group", "folded"),
        ("routed", "per_token", "per_channel", "folded"),
        ("llama", "per_channel", "per_group", "weight_only"),
        ("moe_stablelm", "per_token", "per_channel", "weight_only"),
        ("llama", "per_tensor", "per_tensor", "weight_only"),
    ],
)
def test_the_bits_are_proven(family: str, language: str, weight: str, scaling: str) -> None:
    expected = expected_layers(build(family), vision_tower=True)
    quantization = config(3, language, weight)
    model, _ = run(family, quantization, scaling=scaling, n_grid=2, fallback=False)
    rows = measure_bits(model, expected, toy_batches(2), quantization)
    assert len(rows) == len(expected) and check_bits(rows) == []
    for name in expected:
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        assert torch.equal(layer.weight_quantizer.dequantize(layer.weight_codes()), layer.weight)


class HalfwaySearch(ScaleSearch):
    """Takes alpha = 1/2 everywhere."""

    def choose(self, block: Block, rescaling: Rescaling, samples: dict[str, Tensor]) -> ChosenScale:
        activity = torch.cat([samples[name] for name in rescaling.readers]).abs().mean(0)
        return ChosenScale(rescaling, 0.5, channel_scale(activity, 0.5), 0.0, 0.0)


@pytest.mark.parametrize("language", ["per_channel_group", "per_channel"])
@pytest.mark.parametrize("scaling", ["folded", "weight_only"])
def test_a_layer_is_what_its_scale_says(scaling: str, language: str) -> None:
    """Weight Q(W diag(s)), clipped on x / s, and ranges of x / s; or all of that inside out."""
    spec = config(3, language)
    walk = Walk(build("llama"), toy_batches(2), spec)
    block = next(block for block in walk.blocks() if block.kind == "language")
    method = AWQ(scaling, fallback=False)
    method.search = HalfwaySearch([0.5], scaling == "folded", quantize_inputs=False)
    name, x = "mlp.down_proj", block.linear_inputs()["mlp.down_proj"]
    weight = block.linears[name].weight.detach().clone()
    s = channel_scale(x.abs().mean(0), 0.5)
    method.quantize_block(block)
    layer = block.module.get_submodule(name)
    assert isinstance(layer, QuantLinear)

    inputs = activation_quantizer(x / s if scaling == "folded" else x, spec.language)
    assert isinstance(inputs, UniformQuantizer)
    torch.testing.assert_close(layer.input_quantizer.scale, inputs.scale)
    own = inputs.scale if language == "per_channel" else torch.ones(())
    rounded = weight * s * own
    seen = x / s / own
    quantizer = clipped_quantizer(rounded, seen, spec.weight, method.clip_ratios, inputs)
    expected = quantizer(rounded)
    expected = expected if scaling == "folded" else expected / s
    off = (layer.weight - expected).abs() > 1e-5 * expected.abs().max()
    assert off.float().mean() < 0.01  # a value half way between two codes


def test_weight_only_scaling_leaves_norms_and_activations_alone() -> None:
    first = "model.vision_tower.encoder.layers.0"
    rtn = build("llama")
    before = copy.deepcopy(rtn.state_dict())
    RTN().quantize(Walk(rtn, toy_batches(2), config()))
    ours, _ = run(scaling="weight_only", n_grid=5, fallback=False)
    after = ours.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if "norm" in key)
    layers = [m.get_submodule(f"{first}.self_attn.q_proj") for m in (ours, rtn)]
    assert layers[0].input_quantizer.ratio == layers[1].input_quantizer.ratio


def test_static_per_channel_activations_undo_any_scale() -> None:
    """Their scales go into the weight, so x / s and W diag(s) end up as if s were one."""
    _, report = run(quantization=config(4, "per_channel"), n_grid=4, max_shrink=0)
    for block in report.details["blocks"][-2:]:
        for choice in block["scales"].values():
            assert choice["error"] == pytest.approx(choice["rtn_error"], rel=0.05)
        assert block["error"] == pytest.approx(block["rtn_error"], rel=0.05)


def test_twice_gives_the_same_integers() -> None:
    (first, one), (second, two) = (run("routed", n_grid=3) for _ in range(2))
    states = first.state_dict(), second.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert one.details == two.details


def test_the_report_counts_candidates_and_fits_into_json() -> None:
    _, report = run("routed", n_grid=4, max_shrink=0.5, clip_grid=10)
    read = json.loads(json.dumps(asdict(report)))
    places = sum(len(block["scales"]) for block in read["details"]["blocks"])
    linears = len(expected_layers(build("routed"), vision_tower=True))
    assert read["candidates"] == 4 * places + 5 * linears
    assert read["search_seconds"] > 0
    named = read["details"]["uncalibrated"]
    assert named and all("experts.2." in name for name in named)
    vision = read["details"]["blocks"][0]
    assert vision["unscaled"] == ["mlp.fc2"]
    assert set(vision["scales"]) == {"layer_norm1", "self_attn.v_proj", "layer_norm2"}


def test_the_name_says_which_variant_a_row_is() -> None:
    assert AWQ().name == "AWQ"
    assert AWQ("weight_only").name == "AWQ (weight-only scaling)"
    assert AWQ(search_activations=True).name == "AWQ (quantized search)"
    both = AWQ("weight_only", search_activations=True).name
    assert both == "AWQ (weight-only scaling, quantized search)"


def test_an_activation_that_is_not_finite_ends_the_run_with_its_layer() -> None:
    model = build("llama")
    with torch.no_grad():
        model.get_submodule(f"{DECODER}.1.mlp.gate_proj").weight[0, 0] = float("nan")
    with pytest.raises(RunError, match=r"layers\.1\.mlp\.(gate|down)_proj"):
        AWQ(n_grid=2).quantize(Walk(model, toy_batches(2), config()))


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        (
            {"scaling": "both"},
            "method.scaling=both is not a known value. Choose one of: folded, weight_only",
        ),
        ({"n_grid": 0}, "method.n_grid=0"),
        ({"n_grid": 2.5}, "method.n_grid=2.5"),
        ({"clip_grid": True}, "method.clip_grid=true"),
        ({"max_shrink": 1.0}, "method.max_shrink=1.0"),
        ({"max_shrink": "half"}, "method.max_shrink=half"),
        ({"search_activations": "yes"}, "method.search_activations=yes"),
        ({"fallback": None}, "method.fallback=null"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(parameters: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        AWQ(**parameters)

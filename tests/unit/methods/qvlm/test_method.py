"""Q-VLM and its layer-wise control as methods: reproducible, honest, bounded, never silent."""

import json
from dataclasses import asdict, replace
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qvlm.cell.method import build_method
from qvlm.errors import UserError
from qvlm.methods import base
from qvlm.methods.layerwise import LayerWise
from qvlm.methods.qvlm import QVLM
from qvlm.quantization import (
    QuantizationConfig,
    QuantLinear,
    QuantSpec,
    Walk,
    check_bits,
    expected_layers,
    measure_bits,
)
from qvlm.quantization.normal_float import NormalFloatQuantizer
from tests.helpers.memory import LiveBytes
from tests.helpers.toy import toy_batch, toy_batches, toy_llava

pytestmark = [pytest.mark.instruction_set, pytest.mark.slow]

GRID = (1.0, 0.97)
SHORT: dict[str, Any] = {"percentiles": GRID, "search_tokens": 1, "mining_tokens": 64}
DECODER = "model.language_model.layers"


def config(
    bits: int = 4, vision_tower: bool = True, language: str = "per_channel_group"
) -> QuantizationConfig:
    return QuantizationConfig(
        QuantSpec(bits, "per_group", 16),
        QuantSpec(bits, language, 16),
        QuantSpec(bits, "per_token"),
        vision_tower=vision_tower,
    )


def build(text: str = "llama") -> nn.Module:
    return toy_llava(text, decoder_layers=1, vision_layers=2)


def run(
    method: base.Method, text: str = "llama", quantization: QuantizationConfig | None = None
) -> tuple[nn.Module, base.MethodReport]:
    model = build(text)
    return model, method.quantize(Walk(model, toy_batches(2), quantization or config()))


def integers(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: module.weight_codes()
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
    }


def equal(one: nn.Module, other: nn.Module) -> bool:
    """In integers, scales, norms and everything else."""
    first, second = one.state_dict(), other.state_dict()
    codes = integers(one), integers(other)
    return (
        first.keys() == second.keys()
        and all(torch.equal(first[key], second[key]) for key in first)
        and codes[0].keys() == codes[1].keys()
        and all(torch.equal(codes[0][key], codes[1][key]) for key in codes[0])
    )


# --- the whole ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["llama", "routed", "mixtral"])
def test_twice_gives_the_same_integers(text: str) -> None:
    models, reports = [], []
    for _ in range(2):
        torch.randn(7)  # global random state must not matter
        model, report = run(QVLM(veo_epochs=1, **SHORT), text)
        models.append(model)
        reports.append(report)
    assert equal(*models)
    assert reports[0].details == reports[1].details
    assert reports[0].candidates == reports[1].candidates


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("llama", {}),
        ("routed", {"output": "block", "normalise": False}),
        ("mixtral", {"clip": "further", "clip_weights": False}),
    ],
)
def test_without_its_parts_it_is_the_layer_wise_search(text: str, options: dict[str, Any]) -> None:
    off, one = run(QVLM(cdm=False, veo=False, **SHORT, **options), text)
    control, other = run(LayerWise(percentiles=GRID, search_tokens=1, **options), text)
    assert equal(off, control)
    assert one.candidates == other.candidates > 0
    assert one.details["blocks"] == other.details["blocks"]
    assert {len(block["units"]) for block in other.details["blocks"]} == {1}
    assert one.details["uncalibrated"] == other.details["uncalibrated"]


def test_blocks_of_depth_one_are_the_layer_wise_search_too() -> None:
    shallow, _ = run(QVLM(veo=False, max_depth=1, **SHORT))
    control, _ = run(LayerWise(percentiles=GRID, search_tokens=1))
    assert equal(shallow, control)


def test_each_part_changes_something() -> None:
    switches = [(False, False), (True, False), (False, True)]
    models = [
        run(QVLM(cdm=cdm, veo=veo, veo_epochs=1, **SHORT), quantization=config(3))[0]
        for cdm, veo in switches
    ]
    codes = [integers(model) for model in models]
    for other in codes[1:]:
        assert any(not torch.equal(codes[0][name], other[name]) for name in codes[0])


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("routed", {}),
        ("llama", {"granularity": "layer", "veo": False}),
        ("mixtral", {"granularity": "layer", "cdm": False, "veo": False}),
        ("llama", {"veo_order": "after"}),
        ("llama", {"proxy": "quantization_error", "pairing": "tokens", "veo": False}),
    ],
)
def test_the_bits_are_proven(text: str, options: dict[str, Any]) -> None:
    expected = expected_layers(build(text), vision_tower=True)
    model, report = run(QVLM(veo_epochs=1, **SHORT, **options), text, config(3))
    rows = measure_bits(model, expected, toy_batches(2), config(3))
    assert len(rows) == len(expected) and check_bits(rows) == []
    for name in expected:
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear) and layer.layer_name == name
        assert layer.float_weight is None
        assert torch.equal(layer.weight_quantizer.dequantize(layer.weight_codes()), layer.weight)
    assert not any("Remembering" in type(module).__name__ for module in model.modules())
    json.dumps(asdict(report))


def test_whole_layers_share_a_percentile() -> None:
    """Decoder layers 0 and 1, whose dependency is above the threshold, are one block of two."""
    model = toy_llava("llama", decoder_layers=2, vision_layers=2)
    walk = Walk(model, toy_batches(2), config())
    method = QVLM(granularity="layer", veo=False, h0=0.0, **SHORT)
    report = method.quantize(walk)
    depths = {block["block"]: len(block["units"]) for block in report.details["blocks"]}
    assert depths == {
        "model.vision_tower.encoder.layers.0..model.vision_tower.encoder.layers.1": 2,
        "model.multi_modal_projector": 1,
        f"{DECODER}.0..{DECODER}.1": 2,
    }
    block = report.details["blocks"][-1]
    assert [len(unit) for unit in block["units"]] == [7, 7]
    assert block["error"] <= min(block["layerwise_error"], block["start_error"])
    assert len(integers(model)) == 2 * 6 + 2 + 2 * 7


def test_the_report_says_what_was_done() -> None:
    model, report = run(QVLM(veo_epochs=2, **SHORT), "routed")
    read = json.loads(json.dumps(asdict(report)))
    details = read["details"]
    assert read["search_seconds"] > 0
    assert read["candidates"] == sum(block["candidates"] for block in details["blocks"])
    assert set(details["h0"]) == {"vision", "language"}
    for part, threshold in details["h0"].items():
        known = [
            value
            for chain in details["dependencies"]
            if chain["part"] == part
            for value in chain["dependencies"]
            if value is not None
        ]
        assert threshold == pytest.approx(sum(known) / len(known))
    searched = [name for block in details["blocks"] for unit in block["units"] for name in unit]
    silent = [f"{DECODER}.0.mlp.experts.2.{part}_proj" for part in ("gate", "up", "down")]
    assert details["uncalibrated"] == silent
    assert len(searched) == len(integers(model)) - len(silent)
    assert max(len(block["units"]) for block in details["blocks"]) <= 3
    assert len(details["veo"]["losses"]) == 2 and details["veo"]["pairs"] == 4
    assert sum(details["veo"]["jacobian_norms"].values()) == pytest.approx(1)


def test_a_threshold_of_ones_own_decides() -> None:
    for h0, joint in ((0.0, True), (100.0, False)):
        _, report = run(QVLM(veo=False, h0=h0, **SHORT))
        assert report.details["h0"] == {"vision": h0, "language": h0}
        assert (max(len(block["units"]) for block in report.details["blocks"]) > 1) == joint


def test_a_tower_in_floating_point_is_tuned_all_the_same() -> None:
    model, report = run(QVLM(veo_epochs=1, **SHORT), quantization=config(3, vision_tower=False))
    tower = "model.vision_tower.encoder.layers.0.mlp.fc1"
    assert isinstance(model.get_submodule(tower), nn.Linear)
    assert not torch.equal(model.get_submodule(tower).weight, build().get_submodule(tower).weight)
    assert report.details["veo"]["jacobian_norms"] == {}
    assert report.details["veo"]["losses"][0]["entropy"] == 0


def test_the_layer_wise_report() -> None:
    model, report = run(LayerWise(percentiles=GRID, search_tokens=1), "routed")
    blocks = json.loads(json.dumps(asdict(report)))["details"]["blocks"]
    assert report.candidates == 2 * len(blocks) and report.search_seconds > 0
    for block in blocks:
        assert block["error"] == block["layerwise_error"] <= block["start_error"]
        assert len(block["units"]) == len(block["percentiles"]) == 1
    silent = [f"{DECODER}.0.mlp.experts.2.{part}_proj" for part in ("gate", "up", "down")]
    assert report.details["uncalibrated"] == silent
    assert len(blocks) == len(integers(model)) - 3


# --- memory ---------------------------------------------------------------------------------


def test_mining_and_searching_hold_one_block() -> None:
    """The peak of live tensors, quantized layers aside, is the same for 2 and for 6 layers."""

    # Each operation is watched, which is slow: ranges that take few.
    specs = [QuantSpec(4, name, ranges="minmax") for name in ("per_channel", "per_tensor")]
    quick = QuantizationConfig(*specs, specs[1])

    def peak(vision_layers: int, decoder_layers: int) -> tuple[int, int]:
        model = toy_llava("llama", decoder_layers, vision_layers)
        floats = list(model.parameters())  # alive, lest others be counted as them at their address
        batches = [toy_batch(rows=1, words=40, seed=seed) for seed in range(4)]
        options = {**SHORT, "search_tokens": 1024}
        with LiveBytes(model) as count:
            QVLM(veo=False, h0=0.0, max_depth=2, **options).quantize(Walk(model, batches, quick))
        quantized = sum(
            tensor.untyped_storage().nbytes()
            for module in model.modules()
            if isinstance(module, QuantLinear)
            for tensor in module.buffers()
        )
        del floats
        return count.peak, quantized

    (shallow, some), (deep, more) = peak(2, 2), peak(2, 6)
    held = 4 * 56 * 32 * 4  # one layer's input, 56 tokens 32 wide in float32
    assert shallow > 5 * held
    # What stays of a layer that is done is the quantized layer.
    assert deep - shallow <= 1.02 * (more - some)


# --- bad input ------------------------------------------------------------------------------

BOTH: list[tuple[dict[str, Any], str]] = [
    ({"percentiles": []}, r"method\.percentiles=\[\] is not a list of at least one number"),
    ({"percentiles": [1.0, 0.3]}, r"method\.percentiles=\[1\.0, 0\.3\] is not a list of numbers"),
    ({"percentiles": [1.0, "a"]}, r"method\.percentiles=\[1\.0, 'a'\] is not a list of numbers"),
    ({"percentiles": 0.99}, r"method\.percentiles=0\.99 is not a list"),
    ({"normalise": "no"}, r"method\.normalise=no is not a switch"),
    ({"clip_weights": 0}, r"method\.clip_weights=0 is not a switch"),
    ({"output": "x"}, r"method\.output=x is not a known value. Choose one of: layer, block"),
    ({"clip": "x"}, r"method\.clip=x is not a known value. Choose one of: percentile, further"),
    ({"search_tokens": 0}, r"method\.search_tokens=0 is not a whole number of at least 1"),
]
OWN: list[tuple[dict[str, Any], str]] = [
    ({"cdm": "false"}, r"method\.cdm=false is not a switch"),
    ({"veo": 1}, r"method\.veo=1 is not a switch"),
    ({"scale_free": None}, r"method\.scale_free=null is not a switch"),
    ({"max_depth": 0}, r"method\.max_depth=0 is not a whole number of at least 1"),
    ({"max_depth": "deep"}, r"method\.max_depth=deep is not a whole number of at least 1"),
    ({"h0": -1}, r"method\.h0=-1 is not a finite number of at least 0"),
    ({"h0": float("nan")}, r"method\.h0=nan is not a finite number"),
    ({"h0": "mean"}, r"method\.h0=mean is not a finite number"),
    (
        {"granularity": "model"},
        r"method\.granularity=model is not a known value. Choose one of: linear, layer",
    ),
    (
        {"proxy": "x"},
        r"method\.proxy=x is not a known value. Choose one of: entropy, quantization_error",
    ),
    ({"pairing": "x"}, r"method\.pairing=x is not a known value. Choose one of: elements, tokens"),
    ({"veo_order": "x"}, r"method\.veo_order=x is not a known value. Choose one of: before, after"),
    ({"mining_tokens": 0}, r"method\.mining_tokens=0 is not a whole number of at least 1"),
    ({"veo_epochs": 0}, r"method\.veo_epochs=0 is not a whole number of at least 1"),
    ({"veo_batch_size": 0}, r"method\.veo_batch_size=0 is not a whole number of at least 1"),
    ({"veo_learning_rate": "x"}, r"method\.veo_learning_rate=x is not a finite number"),
    ({"veo_entropy": -1}, r"method\.veo_entropy=-1 is not a finite number of at least 0"),
    ({"veo_eta": float("inf")}, r"method\.veo_eta=inf is not a finite number of at least 0"),
    ({"seed": -1}, r"method\.seed=-1 is not a whole number of at least 0"),
]


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [("qvlm.methods.qvlm.QVLM", *case) for case in [*BOTH, *OWN]]
    + [("qvlm.methods.layerwise.LayerWise", *case) for case in BOTH],
)
def test_a_bad_option_gets_one_sentence(target: str, options: dict[str, Any], message: str) -> None:
    """Through the door that a configuration comes in by."""
    with pytest.raises(UserError, match=f"^{message}") as caught:
        build_method({"_target_": target, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("order", ["before", "after"])
def test_veo_without_images_is_refused_before_anything_changes(order: str) -> None:
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    walk = Walk(model, toy_batches(2, image=False), config())
    with pytest.raises(UserError, match=r"^method\.veo=true .* contains no image"):
        QVLM(veo_order=order, **SHORT).quantize(walk)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_without_veo_no_image_is_needed() -> None:
    model = build()
    report = QVLM(veo=False, **SHORT).quantize(Walk(model, toy_batches(2, image=False), config()))
    assert len(report.details["uncalibrated"]) == 2 * 6 + 2
    assert bool(torch.isfinite(model(**toy_batch()).logits).all())


@pytest.mark.parametrize("options", [{"veo": False}, {"cdm": False, "veo_epochs": 1}])
def test_weights_may_be_those_of_qlora(options: dict[str, Any]) -> None:
    """The paper's Table 1 adds the parts to QLoRA, so ranges of activations are searched alone."""
    model = build("routed")
    method = QVLM(weights="normal_float", percentiles=(1.0, 0.98), **options)
    assert method.name.endswith(" (NormalFloat)")
    expected = expected_layers(model, vision_tower=True)
    floats = {name: model.get_submodule(name).weight.detach().clone() for name in expected}
    method.quantize(Walk(model, toy_batches(), config()))
    for name in expected:
        layer = model.get_submodule(name)
        assert isinstance(layer.weight_quantizer, NormalFloatQuantizer)
        if not method.veo:
            exact = NormalFloatQuantizer.from_weight(floats[name], 4, 64, 256)(floats[name])
            assert torch.equal(layer.weight, exact)
    assert check_bits(measure_bits(model, expected, toy_batches(), config())) == []


def test_the_control_of_normal_float_weights_has_them_too() -> None:
    method = LayerWise(weights="normal_float", percentiles=(1.0, 0.98))
    assert method.name == "Layer-wise (NormalFloat)"
    model, other = build(), build()
    method.quantize(Walk(model, toy_batches(), config()))
    QVLM(cdm=False, veo=False, weights="normal_float", percentiles=(1.0, 0.98)).quantize(
        Walk(other, toy_batches(), config())
    )
    assert equal(model, other)
    with pytest.raises(UserError, match="method.weights=nf"):
        LayerWise(weights="nf")


def test_the_entropy_may_be_that_of_the_language_model() -> None:
    """Experts are left out: they do not read the tokens that their neighbors read."""
    found = {}
    for layers in ("vision", "language"):
        model = build("routed")
        method = QVLM(cdm=False, veo_epochs=1, veo_layers=layers, veo_entropy=5.0, **SHORT)
        report = method.quantize(Walk(model, toy_batches(2), config()))
        found[layers] = integers(model), report.details["veo"]["jacobian_norms"]
    assert all("vision_tower" in name for name in found["vision"][1])
    names = list(found["language"][1])
    assert names and all("language_model" in name and "experts" not in name for name in names)
    assert sum(found["language"][1].values()) == pytest.approx(1)
    one, other = (found[layers][0] for layers in ("vision", "language"))
    assert any(not torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(UserError, match="method.veo_layers=all"):
        QVLM(veo_layers="all")


POSITIONS = QuantSpec(4, "per_position", ranges="minmax")
PARTS: list[dict[str, Any]] = [
    {"veo": False},
    {"veo": False, "pairing": "tokens"},
    {"veo_epochs": 1},
]


@pytest.mark.parametrize("options", PARTS)
def test_scales_of_positions_have_dependencies(options: dict[str, Any]) -> None:
    walk = Walk(
        toy_llava(),
        [toy_batch(rows=2, seed=seed) for seed in range(3)],
        replace(config(), vision=POSITIONS),
    )
    details = QVLM(**options).quantize(walk).details
    chains = [chain for chain in details["dependencies"] if chain["part"] == "vision"]
    assert chains
    assert all(0 < found < log(16) for chain in chains for found in chain["dependencies"])


def test_ranges_of_a_prompt_are_refused_by_name() -> None:
    walk = Walk(toy_llava(), toy_batches(), config(language="per_channel_prompt"))
    with pytest.raises(UserError, match="Q-VLM is not possible with .*per_channel_prompt"):
        QVLM().quantize(walk)

"""The walk against what hooks on the whole model see."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from qvlm.errors import RunError, UserError
from qvlm.quantization.block import Block
from qvlm.quantization.calibration import Walk, batch_by_length
from qvlm.quantization.linear import QuantLinear
from qvlm.quantization.quantizer import TokenQuantizer, UniformQuantizer
from qvlm.quantization.spec import QuantizationConfig, QuantSpec, largest_divisor
from qvlm.quantization.targets import block_layers
from qvlm.quantization.verification import expected_layers
from tests.helpers.memory import LiveBytes
from tests.helpers.toy import toy_batch, toy_batches, toy_llava

pytestmark = pytest.mark.instruction_set

CONFIG = QuantizationConfig(
    weight=QuantSpec(4, "per_channel"),
    language=QuantSpec(4, "per_channel_group", 16),
    vision=QuantSpec(5, "per_token"),
)
VISION = [f"model.vision_tower.encoder.layers.{i}" for i in range(3)]
DECODER = [f"model.language_model.layers.{i}" for i in range(2)]
PROJECTOR = "model.multi_modal_projector"


def quantize(block: Block) -> None:
    for name, samples in block.linear_inputs().items():
        block.replace(name, block.quantize_linear(name, samples))


def seen_by(
    model: nn.Module, names: list[str], batches: list[dict[str, Tensor]]
) -> dict[str, list[Tensor]]:
    """The first argument of each call of the named modules in plain forward passes."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: seen[name].append(args[0].clone())

    hooks = [model.get_submodule(name).register_forward_pre_hook(record(name)) for name in names]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether both hold the same rows, however they are batched."""
    mine, yours = ([row for part in parts for row in part] for parts in (ours, theirs))
    return len(mine) == len(yours) and all(map(torch.equal, mine, yours))


@pytest.mark.parametrize("text", ["llama", "routed", "mixtral"])
def test_a_walk_without_changes_is_the_float_model(text: str) -> None:
    model, batches = toy_llava(text), toy_batches()
    walk = Walk(model, batches, CONFIG)
    assert walk.names == [*VISION, PROJECTOR, *DECODER]
    expected = seen_by(model, walk.names, batches)
    kinds = []
    for block in walk.blocks():
        assert equal([args[0] for args, _ in block.inputs], expected[block.name])
        # One has no image, and those of the others go together.
        assert len(block.inputs) == (3 if block.kind == "language" else 1)
        kinds.append(block.kind)
    assert kinds == ["vision"] * 3 + ["projector"] + ["language"] * 2
    assert [block.name for block in walk.blocks()] == walk.names  # and again


def test_a_block_sees_what_the_quantized_model_will_show_it() -> None:
    model, batches = toy_llava("routed"), toy_batches()
    walk = Walk(model, batches, CONFIG)
    inputs, outputs = {}, {}
    for block in walk.blocks():
        inputs[block.name] = [args[0].clone() for args, _ in block.inputs]
        quantize(block)
        outputs[block.name] = block.run()
    after = seen_by(model, walk.names, batches)
    assert all(equal(inputs[name], after[name]) for name in walk.names)
    assert equal(outputs[DECODER[0]], after[DECODER[1]])
    float_inputs = seen_by(toy_llava("routed"), walk.names, batches)
    changed = [not equal(inputs[name], float_inputs[name]) for name in walk.names]
    assert changed == [False] + [True] * 5


def test_float_outputs_are_those_of_the_float_block_on_quantized_inputs() -> None:
    model = toy_llava()
    for block in Walk(model, toy_batches(), CONFIG).blocks():
        before = block.run()
        quantize(block)
        assert equal(block.float_outputs(), before)
        assert not equal(block.run(), before)
        assert block.float_outputs() is block.float_outputs()


def test_restore_puts_the_float_linear_back() -> None:
    block = next(Walk(toy_llava(), toy_batches(), CONFIG).blocks())
    before = block.run()
    quantize(block)
    assert isinstance(block.module.get_submodule("mlp.fc1"), QuantLinear)
    for name in block.linears:
        block.restore(name)
    assert equal(block.run(), before)
    assert block.module.get_submodule("mlp.fc1") is block.linears["mlp.fc1"]


def test_linears_come_in_the_order_of_execution_without_routers() -> None:
    blocks = {
        block.name: list(block.linears)
        for block in Walk(toy_llava("routed"), toy_batches(), CONFIG).blocks()
    }
    attention = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
    assert blocks[VISION[0]] == [*attention, "mlp.fc1", "mlp.fc2"]
    assert blocks[PROJECTOR] == ["linear_1", "linear_2"]
    parts = ("gate_proj", "up_proj", "down_proj")
    experts = [f"mlp.experts.{expert}.{part}" for expert in range(3) for part in parts]
    assert blocks[DECODER[0]] == [*attention[:3], "self_attn.o_proj", *experts]


@pytest.mark.parametrize("text", ["routed", "mixtral"])
def test_linear_inputs_are_what_each_linear_sees(text: str) -> None:
    model, batches = toy_llava(text), toy_batches()
    walk = Walk(model, batches, CONFIG)
    block = next(block for block in walk.blocks() if block.name == DECODER[0])
    names = [f"{block.name}.{name}" for name in block.linears]
    expected = seen_by(model, names, batches)
    samples = block.linear_inputs(max_tokens=None)
    assert list(samples) == list(block.linears)
    for name, tokens in samples.items():
        seen = expected[block.layer_name(name)]
        if seen:
            assert torch.equal(tokens, torch.cat([part.flatten(0, -2) for part in seen]))
        else:
            assert tokens.shape == (0, block.linears[name].in_features)
    unseen = [name for name, tokens in samples.items() if not len(tokens)]
    assert all("experts.2." in name for name in unseen) and len(unseen) == 3 * (text == "routed")


def test_linear_inputs_are_bounded_and_spread_over_the_batches() -> None:
    batches = toy_batches()
    block = next(iter(Walk(toy_llava(), batches, CONFIG).blocks()))
    everything = block.linear_inputs(max_tokens=None)["mlp.fc1"]
    some = block.linear_inputs(max_tokens=10)["mlp.fc1"]
    assert len(everything) == 4 * 17 and len(some) == 10
    rows = [(everything == token).all(1).nonzero()[0, 0].item() for token in some]
    assert rows == sorted(set(rows))
    assert sum(row < len(everything) // 2 for row in rows) == 5
    assert torch.equal(some, block.linear_inputs(max_tokens=10)["mlp.fc1"])


def test_specs_follow_the_kind_of_block() -> None:
    for block in Walk(toy_llava(), toy_batches(), CONFIG).blocks():
        expected = CONFIG.vision if block.kind == "vision" else CONFIG.language
        quantize(block)
        for name in block.linears:
            assert block.spec(name) == (CONFIG.weight, expected)
            layer = block.module.get_submodule(name)
            assert isinstance(layer, QuantLinear)
            assert layer.layer_name == f"{block.name}.{name}"
            kind = TokenQuantizer if block.kind == "vision" else UniformQuantizer
            assert type(layer.input_quantizer) is kind
            assert layer.input_quantizer.bits == expected.bits


def test_without_the_vision_tower_the_walk_starts_at_the_projector() -> None:
    config = QuantizationConfig(CONFIG.weight, CONFIG.language, CONFIG.vision, vision_tower=False)
    model, batches = toy_llava(), toy_batches()
    expected = seen_by(model, [PROJECTOR], batches)[PROJECTOR]
    walk = Walk(model, batches, config)
    assert walk.names == [PROJECTOR, *DECODER]
    for block in walk.blocks():
        if block.name == PROJECTOR:
            assert equal([args[0] for args, _ in block.inputs], expected)
        quantize(block)
    tower = model.model.vision_tower
    assert not any(isinstance(module, QuantLinear) for module in tower.modules())


def test_a_calibration_set_without_images_leaves_vision_layers_per_token() -> None:
    model = toy_llava()
    walk = Walk(model, toy_batches(image=False), CONFIG)
    for block in walk.blocks():
        assert len(block.inputs) == (3 if block.kind == "language" else 0)
        quantize(block)
    assert len(walk.uncalibrated) == len(set(walk.uncalibrated)) == 3 * 6 + 2
    assert f"{PROJECTOR}.linear_2" in walk.uncalibrated
    layer = model.get_submodule(f"{PROJECTOR}.linear_2")
    assert isinstance(layer, QuantLinear)
    assert isinstance(layer.input_quantizer, TokenQuantizer) and layer.input_quantizer.bits == 4
    assert bool(torch.isfinite(model(**toy_batch()).logits).all())


def test_an_expert_without_tokens_is_named() -> None:
    walk = Walk(toy_llava("routed"), toy_batches(), CONFIG)
    for block in walk.blocks():
        quantize(block)
    parts = ("gate_proj", "up_proj", "down_proj")
    assert walk.uncalibrated == [f"{DECODER[0]}.mlp.experts.2.{part}" for part in parts]


def test_a_partition_joins_layers_into_one_block() -> None:
    model, batches = toy_llava("routed", decoder_layers=3), toy_batches()
    expected = seen_by(model, ["model.language_model.norm"], batches)["model.language_model.norm"]
    walk = Walk(model, batches, CONFIG)
    layers = [f"model.language_model.layers.{i}" for i in range(3)]
    partition = [VISION[:2], VISION[2:], [PROJECTOR], layers]
    blocks = []
    for block in walk.blocks(partition):
        blocks.append((block.name, len(block.linears)))
        if block.kind == "language":
            assert equal(block.run(), expected)
            name = "1.mlp.down_proj"
            assert block.layer_name(name) == f"{layers[1]}.mlp.down_proj"
            block.replace(name, block.quantize_linear(name, block.linear_inputs()[name]))
            assert not equal(block.run(), expected) and equal(block.float_outputs(), expected)
    assert [count for _, count in blocks] == [12, 6, 2, 13 + 7 + 7]
    assert blocks[0][0] == f"{VISION[0]}..{VISION[1]}"
    assert isinstance(model.get_submodule(f"{layers[1]}.mlp.down_proj"), QuantLinear)


@pytest.mark.parametrize(
    ("partition", "reason"),
    [
        ([VISION, [PROJECTOR], DECODER[:1]], r"layers\.1 is missing"),
        ([VISION, [PROJECTOR], DECODER[::-1]], "order"),
        ([VISION, [PROJECTOR, *DECODER]], "one kind"),
        ([VISION, [PROJECTOR], DECODER, []], "one kind"),
        ([VISION, [PROJECTOR], DECODER, DECODER[1:]], "order or number"),
    ],
)
def test_a_partition_that_does_not_cover_is_refused(
    partition: list[list[str]], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        Walk(toy_llava(), toy_batches(), CONFIG).blocks(partition)


def test_what_cannot_be_walked_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="calibration set is empty"):
        Walk(toy_llava(), [], CONFIG)
    groups = QuantizationConfig(
        QuantSpec(4, "per_group", 24), CONFIG.language, CONFIG.vision, vision_tower=False
    )
    with pytest.raises(UserError, match=r"group_size=24 .*multi_modal_projector\.linear_1"):
        Walk(toy_llava(), toy_batches(), groups)
    with pytest.raises(UserError, match="vision_tower"):
        Walk(nn.Linear(2, 2), toy_batches(), CONFIG)
    model = toy_llava()
    model.config.text_config.layer_types = ["full_attention", "sliding_attention"]
    model.config.model_type = "unlisted"
    with pytest.raises(UserError, match="attention"):
        Walk(model, toy_batches(), CONFIG)


def test_what_is_not_finite_is_an_error_with_the_layers_name() -> None:
    model = toy_llava()
    with torch.no_grad():
        model.model.language_model.layers[1].input_layernorm.weight[3] = float("nan")
    with pytest.raises(RunError, match=r"layers\.1\.self_attn\.q_proj is not finite"):
        for block in Walk(model, toy_batches(), CONFIG).blocks():
            quantize(block)
    model = toy_llava()
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight[0, 0] = float("inf")
    with pytest.raises(RunError, match=r"weight of .*linear_1 is not finite"):
        for block in Walk(model, toy_batches(), CONFIG).blocks():
            quantize(block)


def test_memory_does_not_grow_with_depth() -> None:
    def peak(vision_layers: int, decoder_layers: int) -> int:
        model = toy_llava("llama", decoder_layers, vision_layers)
        batches = [toy_batch(rows=1, words=40, seed=seed) for seed in range(12)]
        held = 12 * 56 * 32 * 4  # the decoder's input, 56 tokens 32 wide in float32
        with LiveBytes(model) as count:
            for block in Walk(model, batches, CONFIG).blocks():
                block.linear_inputs(max_tokens=64)
                block.float_outputs()
        assert held < count.peak
        return count.peak

    shallow, deep = peak(2, 2), peak(6, 8)
    assert deep <= 1.02 * shallow


def test_a_block_that_is_done_holds_nothing() -> None:
    model = toy_llava()
    blocks = []
    for block in Walk(model, toy_batches(), CONFIG).blocks():
        quantize(block)
        blocks.append((block, weakref.ref(next(iter(block.linears.values())))))
    assert all(not block.inputs and not block.linears for block, _ in blocks)
    assert all(linear() is None for _, linear in blocks)
    layers = block_layers(model, vision_tower=True)
    assert [block.module for block, _ in blocks] == [module for _, module in layers.values()]


class WordsAndImages:
    """Encodes a problem as its words, in front of which an image takes two tokens."""

    def encode(self, problems: Any, with_target: bool = False) -> dict[str, Tensor]:
        (problem,) = problems
        assert with_target
        ids = torch.tensor([[*([1, 1] if problem["image"] else []), *problem["ids"]]])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if problem["image"]:
            batch["pixel_values"] = torch.full((1, 3, 2, 2), float(problem["ids"][0]))
        return batch


def test_batches_hold_problems_of_one_length_and_kind() -> None:
    problems = [
        {"image": False, "ids": [10, 11, 12]},
        {"image": True, "ids": [20]},  # as long as the first, but with an image
        {"image": False, "ids": [30, 31]},
        {"image": True, "ids": [40]},
        {"image": False, "ids": [50, 51, 52]},
        {"image": False, "ids": [60, 61, 62]},
    ]
    batches = batch_by_length(WordsAndImages(), problems, batch_size=2)
    ids = [batch["input_ids"].tolist() for batch in batches]
    assert ids == [
        [[10, 11, 12], [50, 51, 52]],
        [[60, 61, 62]],
        [[1, 1, 20], [1, 1, 40]],
        [[30, 31]],
    ]
    assert ["pixel_values" in batch for batch in batches] == [False, False, True, False]
    assert batches[2]["pixel_values"][:, 0, 0, 0].tolist() == [20, 40]
    assert all(bool(batch["attention_mask"].all()) for batch in batches)


def test_an_empty_or_impossible_batching_is_refused() -> None:
    with pytest.raises(UserError, match="empty"):
        batch_by_length(WordsAndImages(), [], 4)
    with pytest.raises(UserError, match="batch_size=0"):
        batch_by_length(WordsAndImages(), [{"image": False, "ids": [1]}], 0)


def test_mixed_attention_of_a_language_model_alone_is_refused() -> None:
    config = Qwen2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=2,
    )
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    with pytest.raises(UserError, match="not all of one attention type"):
        Walk(Qwen2ForCausalLM(config), [batch], CONFIG)


def test_a_linear_with_two_names_is_refused() -> None:
    """Under one of them it would stay in floating point, and no proof would see it."""
    model = toy_llava()
    attention = model.get_submodule("model.language_model.layers.0.self_attn")
    attention.k_proj = attention.v_proj
    for look in (lambda: expected_layers(model, True), lambda: Walk(model, toy_batches(), CONFIG)):
        with pytest.raises(UserError, match="k_proj and .*v_proj are one module"):
            look()


def test_a_layer_with_two_names_is_refused() -> None:
    model = toy_llava()
    layers = model.get_submodule("model.language_model.layers")
    layers[1] = layers[0]
    with pytest.raises(UserError, match=r"layers\.0 and .*layers\.1 are one module"):
        expected_layers(model, True)


def test_ranges_of_a_prompt_are_refused_in_experts() -> None:
    """A decoded token is alone in its expert, and a range of one value has no rounding error."""
    of_prompt = replace(CONFIG, language=QuantSpec(4, "per_channel_prompt"))
    Walk(toy_llava(), toy_batches(), of_prompt)
    with pytest.raises(UserError, match=r"not possible for .*experts\.0"):
        Walk(toy_llava("routed"), toy_batches(), of_prompt)


@pytest.mark.parametrize(
    ("width", "size"), [(576, 96), (1536, 128), (4304, 16), (131, 131), (8, 8), (2 * 131, 262)]
)
def test_groups_are_never_of_a_few_elements(width: int, size: int) -> None:
    assert largest_divisor(width) == size

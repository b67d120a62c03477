"""Every family: each linear is quantized once, and proven, packed, saved and loaded."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AyaVisionConfig, PhiConfig

from qvlm.errors import UserError
from qvlm.families import FAMILIES
from qvlm.methods import RTN
from qvlm.methods.awq import AWQ
from qvlm.methods.gptq.method import stages
from qvlm.methods.qvlm import QVLM
from qvlm.methods.roco import RoCo
from qvlm.methods.rotation import QuaRot
from qvlm.models.chat import FamilyModel
from qvlm.models.meta import meta_model
from qvlm.models.packed import save_packed_model
from qvlm.packing import force_kernel, measure_packed_bits, pack_model
from qvlm.quantization import (
    QuantizationConfig,
    QuantLinear,
    QuantSpec,
    Walk,
    batch_by_length,
    check_bits,
    expected_layers,
    measure_bits,
)
from qvlm.quantization.block import Block
from tests.helpers.families import TINY, Loaded, load_tiny, problems, tiny_model
from tests.helpers.origins import make_origin

METHODS: dict[str, Callable[[], Any]] = {
    "rtn": RTN,
    "awq": lambda: AWQ(n_grid=2, clip_grid=2),
    "roco": RoCo,
}
# Its residual stream cannot be rotated: see below.
IN_PARTS: dict[str, Callable[[], Any]] = {"gemma3": lambda: RoCo(stream=False)}
# What AWQ may rescale in a decoder layer, as docs/families.md says.
BY_DEFAULT = {"input_layernorm", "post_attention_layernorm", "mlp.up_proj"}
NORMS = {"input_layernorm", "post_attention_layernorm"}
UPS = {f"mlp.experts.{expert}.up_proj" for expert in range(4)}
RESCALED = {
    "qwen3_vl_moe": NORMS | UPS,
    "glm4v_moe": NORMS | UPS | {"mlp.shared_experts.up_proj"},
    "internvl_gpt_oss": NORMS,  # its experts add one to what the up projection gives, and clamp it
    "gemma3": {"mlp.up_proj"},
}
CELLS = [(name, method) for name in TINY for method in METHODS]
W4A4 = QuantizationConfig(
    QuantSpec(4, "per_group", 16, ranges="minmax"),
    QuantSpec(4, "per_channel_group", 16, ranges="minmax"),
    QuantSpec(4, "per_token", ranges="minmax"),
)
# What stays in floating point, besides the output head; written by hand and not read from tables.
HEAD = [f"model.vision_tower.head.{part}" for part in ("attention.out_proj", "mlp.fc1", "mlp.fc2")]
FLOAT = {"llava_onevision": HEAD, "gemma3": HEAD}


def linears(model: nn.Module, name: str) -> list[str]:
    """All linears of a float model but those that stay so, each expert's for itself."""
    found = []
    for part, module in model.named_modules():
        if isinstance(module, nn.Linear) and part not in ("lm_head", *FLOAT.get(name, ())):
            found.append(part)
        if type(module).__name__.endswith("Experts"):
            experts = len(next(module.parameters()))
            found += [
                f"{part}.{expert}.{linear}"
                for expert in range(experts)
                for linear in ("gate_proj", "up_proj", "down_proj")
            ]
    return sorted(found)


def walk_over(loaded: FamilyModel) -> Walk:
    return Walk(loaded.model, batch_by_length(loaded, problems(), 8), W4A4)


@torch.no_grad()
def logits(loaded: FamilyModel) -> Tensor:
    batch: dict[str, Any] = loaded.encode(problems())
    found: Tensor = loaded.model(**batch, use_cache=False).logits
    return found


@pytest.mark.parametrize("name", TINY)
def test_a_walk_without_changes_gives_each_block_what_the_model_gives_it(
    name: str, tiny: Loaded
) -> None:
    loaded = tiny(name)
    walk = walk_over(loaded)
    expected: dict[str, list[Any]] = {part: [] for part in walk.names}

    def note(part: str) -> Callable[..., None]:
        return lambda module, args, kwargs: expected[part].append((args, kwargs))

    for part in walk.names:
        loaded.model.get_submodule(part).register_forward_pre_hook(note(part), with_kwargs=True)
    with torch.no_grad():
        for batch in walk.batches:
            loaded.model(**batch, use_cache=False)
    wanted = {part: list(calls) for part, calls in expected.items()}
    seen = {block.name: [*block.inputs] for block in walk.blocks()}
    assert [*seen] == walk.names
    for part, calls in seen.items():
        if len(calls) != len(wanted[part]):  # calls of images alone were merged
            calls, wanted[part] = [_merged(calls)], [_merged(wanted[part])]
        for call, other in zip(calls, wanted[part], strict=True):
            _assert_same(call, other)


def _merged(calls: list[Any]) -> Any:
    return (torch.cat([args[0] for args, _ in calls]), *calls[0][0][1:]), calls[0][1]


def _assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    elif isinstance(one, tuple | list):
        assert len(one) == len(other)
        for part, match in zip(one, other, strict=True):
            _assert_same(part, match)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            _assert_same(one[key], other[key])
    else:
        assert one == other


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), CELLS)
def test_each_linear_is_quantized_once_proven_packed_saved_and_loaded(
    name: str, method: str, tiny: Loaded, tmp_path: Path
) -> None:
    loaded = tiny(name)
    wanted, expected = linears(loaded.model, name), expected_layers(loaded.model, True)
    assert sorted(expected) == wanted and len(set(expected)) == len(expected)
    walk = walk_over(loaded)
    make = IN_PARTS.get(name, RoCo) if method == "roco" else METHODS[method]
    report = make().quantize(walk)
    if method == "awq":
        assert {*report.details["blocks"][-1]["scales"]} == RESCALED.get(name, BY_DEFAULT)
    quantized = [n for n, m in loaded.model.named_modules() if isinstance(m, QuantLinear)]
    assert sorted(quantized) == wanted
    batch = loaded.encode(problems())
    assert not check_bits(measure_bits(loaded.model, expected, [batch], W4A4))
    pack_model(loaded.model, "reference")
    save_packed_model(loaded, tmp_path / "packed", make_origin(expected=expected))
    again = load_tiny(tmp_path / "packed")
    force_kernel(again.model, "reference")
    assert again.tokenizer.eos_token == loaded.tokenizer.eos_token
    assert torch.equal(logits(again), logits(loaded))
    assert not check_bits(measure_packed_bits(again.model, expected, [batch]))


def test_a_head_that_a_rotation_gave_a_bias_is_packed_and_loaded_with_it(
    tiny: Loaded, tmp_path: Path
) -> None:
    """Phi's last norm has a shift. LLaVA's head has no bias until the shift is folded into it."""
    loaded = tiny("llava")
    config = loaded.model.config
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    sizes += ("num_attention_heads", "max_position_embeddings", "bos_token_id", "eos_token_id")
    config.text_config = PhiConfig(**{key: getattr(config.text_config, key) for key in sizes})
    torch.manual_seed(0)
    loaded.model = type(loaded.model)(config).eval()
    with torch.no_grad():
        shift = loaded.model.get_parameter("model.language_model.final_layernorm.bias")
        shift.normal_()
    RoCo().quantize(walk_over(loaded))
    head: Any = loaded.model.get_output_embeddings()
    assert head.bias.abs().max() > 0
    pack_model(loaded.model, "reference")
    expected = expected_layers(loaded.model, True)
    save_packed_model(loaded, tmp_path / "packed", make_origin(expected=expected))
    again = load_tiny(tmp_path / "packed")
    force_kernel(again.model, "reference")
    assert torch.equal(logits(again), logits(loaded))


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_rotation_leaves_the_model_as_it_is(
    name: str, tiny: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny(name)
    before = logits(loaded)
    monkeypatch.setattr(Block, "quantize_linear", lambda block, part, *_, **__: block.linears[part])
    monkeypatch.setattr(Block, "replace", lambda *_: None)
    QuaRot(rounding="nearest", online=(), stream=name != "gemma3").quantize(walk_over(loaded))
    torch.testing.assert_close(logits(loaded), before, rtol=1e-3, atol=1e-4)


def test_what_a_method_cannot_do_is_refused_by_name(tiny: Loaded) -> None:
    gemma = tiny("gemma3")
    with pytest.raises(
        UserError, match="Gemma 3's residual stream cannot be rotated: a norm stands"
    ):
        RoCo().quantize(walk_over(gemma))
    with pytest.raises(UserError, match="veo=true is not possible with Gemma 3, whose tower is"):
        QVLM().quantize(walk_over(gemma))
    with pytest.raises(UserError, match=r"layers\.0 and .*layers\.1 cannot be searched jointly"):
        for _ in walk_over(gemma).blocks(_joined(walk_over(gemma).names, "language_model")):
            pass
    qwen = tiny("qwen2_5_vl")
    first = QuantizationConfig(W4A4.weight, W4A4.language, W4A4.vision, first_token="float")
    with pytest.raises(UserError, match="first_token=float is not possible with Qwen2.5-VL"):
        Walk(qwen.model, [qwen.encode(problems())], first)


def _joined(names: list[str], part: str) -> list[list[str]]:
    together = [name for name in names if part in name]
    return [*([name] for name in names if name not in together), together]


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "internvl_gpt_oss", "glm4v_moe"])
def test_experts_taken_apart_give_equal_logits(name: str, tiny: Loaded) -> None:
    loaded = tiny(name)
    before = logits(loaded)
    walk_over(loaded)
    layer = loaded.model.get_submodule("model.language_model.layers.1.mlp.experts")
    assert len(list(layer.children())) == 4
    torch.testing.assert_close(logits(loaded), before, rtol=1e-5, atol=1e-5)


def test_a_family_can_be_described_in_python_as_the_page_shows() -> None:
    page = (Path(__file__).parents[3] / "docs" / "families.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.S)
    tower = {"model_type": "siglip_vision_model", "hidden_size": 32, "num_attention_heads": 4}
    config = AyaVisionConfig(vision_config={**tower, "vision_use_head": False})
    try:
        exec(example, {})
        model = meta_model(config, torch.float32)
        assert sorted(expected_layers(model, True)) == linears(model, "aya_vision")
    finally:
        FAMILIES.pop("aya_vision", None)


def test_the_tiny_models_have_the_difficulties_that_they_are_to_prove() -> None:
    """Windows, DeepStack, sliding layers, QK norms, biases, merged projections, attention sinks,
    experts with biases and shared experts are there."""
    qwen = tiny_model("qwen2_5_vl").config.vision_config
    assert qwen.depth > len(qwen.fullatt_block_indexes) > 0
    assert tiny_model("qwen3_vl").config.vision_config.deepstack_visual_indexes
    gemma = tiny_model("gemma3")
    assert len({*gemma.config.text_config.layer_types}) == 2
    attention: Any = gemma.get_submodule("model.language_model.layers.0.self_attn")
    assert attention.q_norm.weight.abs().max() > 0
    oss = tiny_model("internvl_gpt_oss")
    assert oss.get_parameter("model.language_model.layers.0.self_attn.sinks").abs().max() > 0
    assert oss.get_parameter("model.language_model.layers.0.mlp.experts.down_proj_bias").any()
    assert len({*oss.config.text_config.layer_types}) == 2
    glm = tiny_model("glm4v_moe")
    assert glm.get_submodule("model.language_model.layers.1.mlp.shared_experts")
    assert isinstance(glm.get_submodule("model.language_model.layers.0.mlp.up_proj"), nn.Linear)
    merged: Any = tiny_model("qwen2_vl").get_submodule("model.visual.blocks.0.attn.qkv")
    assert merged.bias is not None and merged.out_features == 3 * merged.in_features


def test_linears_of_other_names_are_rounded_in_the_order_of_the_data(tiny: Loaded) -> None:
    """Merged projections have names of their own, which do not say where they stand."""
    wanted = {
        "vision": [["attn.qkv"], ["attn.proj"], ["mlp.fc1"], ["mlp.fc2"]],
        "projector": [["mlp.0"], ["mlp.2"]],
    }
    kinds = set()
    for block in walk_over(tiny("qwen2_vl")).blocks():
        kinds.add(block.kind)
        assert stages(block) == wanted.get(block.kind, stages(block))
        assert sorted(name for stage in stages(block) for name in stage) == sorted(block.linears)
    assert kinds == {"vision", "projector", "language"}

"""GPTQ as a method: the order of the data, tokens of experts, and what the report names."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qvlm.errors import UserError
from qvlm.methods.gptq.method import GPTQ, Compensated, Rounding, stages
from qvlm.methods.gptq.rounding import compensated_rounding
from qvlm.methods.gptq.samples import collect
from qvlm.methods.rtn import RTN
from qvlm.quantization.block import Block
from qvlm.quantization.calibration import Walk
from qvlm.quantization.linear import QuantLinear
from qvlm.quantization.spec import QuantizationConfig, QuantSpec
from qvlm.quantization.verification import check_bits, expected_layers, measure_bits
from tests.helpers.toy import toy_batch, toy_batches, toy_llava

pytestmark = pytest.mark.instruction_set

LAYER = "model.language_model.layers"


def config(language: str = "per_channel_group", vision_tower: bool = False) -> QuantizationConfig:
    return QuantizationConfig(
        QuantSpec(4, "per_group", 16),
        QuantSpec(4, language, 16),
        QuantSpec(4, "per_token"),
        vision_tower,
    )


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**toy_batch(seed=5)).logits


def quantized(text: str = "llama", **options: object) -> tuple[nn.Module, dict[str, object]]:
    model = toy_llava(text)
    report = GPTQ(**options).quantize(Walk(model, toy_batches(), config()))
    return model, json.loads(json.dumps(asdict(report)))["details"]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("llama", "per_channel"),
        ("routed", "per_channel_group"),
        ("mixtral", "per_token"),
        ("llama", "per_tensor"),
    ],
)
def test_the_bits_are_proven(text: str, language: str) -> None:
    model = toy_llava(text)
    expected = expected_layers(model, vision_tower=True)
    GPTQ(min_tokens=1).quantize(Walk(model, toy_batches(), config(language, vision_tower=True)))
    rows = measure_bits(model, expected, toy_batches(), config(language, vision_tower=True))
    assert len(rows) == len(expected) and check_bits(rows) == []


def test_weights_are_closer_than_those_of_rtn_where_inputs_say_so() -> None:
    _, details = quantized(min_tokens=1)
    shares = [layer["error"] for layer in details["layers"]]
    assert len(shares) == len(expected_layers(toy_llava(), vision_tower=False))
    assert max(shares) <= 1 and sorted(shares)[len(shares) // 2] < 0.9


def test_the_logits_are_closer_than_those_of_rtn() -> None:
    exact, rounded = logits(toy_llava()), toy_llava()
    RTN().quantize(Walk(rounded, toy_batches(), config()))
    errors = [float((logits(m) - exact).norm()) for m in (quantized()[0], rounded)]
    assert errors[0] < errors[1]


def test_linears_are_rounded_in_the_order_of_the_data() -> None:
    """What a linear reads comes from the quantized linears before it in the block."""
    block = decoder_block(toy_llava(), toy_batches())
    order: list[str] = []
    replace = block.replace

    def spy(name: str, layer: QuantLinear) -> None:
        order.append(name)
        replace(name, layer)

    block.replace = spy  # type: ignore[method-assign]
    Compensated(Rounding()).quantize(block)
    assert order == [
        *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *(f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")),
    ]
    name = "mlp.down_proj"
    down = block.module.get_submodule(name)
    gram = collect(block, [name], 4096)[name].gram(down.input_quantizer)
    again = compensated_rounding(block.linears[name].weight, gram, down.weight_quantizer)
    assert torch.equal(again, down.weight)


def decoder_block(model: nn.Module, batches: list[dict[str, Tensor]]) -> Block:
    """The first decoder layer of a model whose earlier blocks are rounded to nearest."""
    for block in Walk(model, batches, config()).blocks():
        if block.kind == "language":
            return block
        round_to_nearest(block)
    raise AssertionError


def round_to_nearest(block: Block) -> None:
    for name, samples in block.linear_inputs().items():
        block.replace(name, block.quantize_linear(name, samples))


def test_stages_follow_the_usual_names() -> None:
    names = ["mlp.fc1", "mlp.fc2", "self_attn.dense", "self_attn.q_proj", "linear_1"]
    block: Any = SimpleNamespace(linears=dict.fromkeys(names))
    assert stages(block) == [
        ["self_attn.q_proj"],
        ["self_attn.dense"],
        ["mlp.fc1", "linear_1"],
        ["mlp.fc2"],
    ]


@pytest.mark.parametrize("text", ["routed", "mixtral"])
def test_tokens_of_experts_keep_their_weights(text: str) -> None:
    """Weights that say which token it is are found again beside the token's own features."""
    block = decoder_block(toy_llava(text), [toy_batch(rows=3, words=7)])
    names = [name for name in block.linears if "experts" in name]
    (hidden,) = [call[0][0] if call[0] else call[1]["hidden_states"] for call in block.inputs]
    number = torch.arange(hidden.shape[:-1].numel(), dtype=torch.float64)
    everything = collect(block, ["self_attn.q_proj", *names], 10_000, [number])
    plain = collect(block, names, 10_000)
    assert torch.equal(everything["self_attn.q_proj"].weights, number)
    reached = [name for name in names if len(plain[name].tokens)]
    assert len(reached) > 0
    mixture_inputs: list[Tensor] = []
    block.module.mlp.register_forward_pre_hook(
        lambda module, args: mixture_inputs.append(args[0].flatten(0, -2))
    )
    block.run()
    for name in reached:
        assert torch.equal(everything[name].tokens, plain[name].tokens)
        rows = everything[name].weights.long()
        if name.endswith(("gate_proj", "up_proj")):
            assert torch.equal(mixture_inputs[0][rows], everything[name].tokens)
    for down in (name for name in reached if name.endswith("down_proj")):
        gate = down.replace("down_proj", "gate_proj")
        assert torch.equal(everything[down].weights, everything[gate].weights)


def test_weights_count_in_the_gram_matrix() -> None:
    block = decoder_block(toy_llava(), [toy_batch(rows=2, words=4, image=False)])
    counts = torch.tensor([3.0, 0, 1, 1, 0, 2, 1, 1], dtype=torch.float64)
    name = "self_attn.q_proj"
    samples = collect(block, [name], 100, [counts])[name]
    inputs = block.input_quantizer(name, samples.tokens)
    repeated = samples.tokens.repeat_interleave(counts.long(), dim=0)
    x = inputs(repeated).double()
    assert torch.allclose(samples.gram(inputs), x.T @ x, rtol=1e-12)


def test_an_expert_with_few_tokens_is_rounded_to_nearest_and_named() -> None:
    _, details = quantized("routed", min_tokens=1)
    named = details["rounded_to_nearest"]
    assert named and all("experts.2." in name for name in named)  # no token reaches it
    assert details["uncalibrated"] == named
    everything, details = quantized("routed", min_tokens=10_000)
    assert set(details["rounded_to_nearest"]) == set(
        expected_layers(toy_llava("routed"), vision_tower=False)
    )
    plain = toy_llava("routed")
    RTN().quantize(Walk(plain, toy_batches(), config()))
    first = "model.multi_modal_projector.linear_1"
    assert torch.equal(everything.get_submodule(first).weight, plain.get_submodule(first).weight)


def test_twice_gives_the_same_codes() -> None:
    first, second = (quantized("routed")[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"damping": 0}, "method.damping=0"),
        ({"activation_order": 1}, "method.activation_order=1"),
        ({"max_tokens": 0}, "method.max_tokens=0"),
        ({"min_tokens": -1}, "method.min_tokens=-1"),
        ({"sequential": "yes"}, "method.sequential=yes"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        GPTQ(**options)


def test_first_positions_that_stay_in_float_are_not_calibrated_on() -> None:
    quantization = replace(config(), first_token="float")
    walk = Walk(toy_llava(), [toy_batch(rows=3, words=7, image=False)], quantization)
    block = next(block for block in walk.blocks() if block.kind == "language")
    names = ["self_attn.q_proj", "mlp.down_proj"]
    number = torch.arange(21, dtype=torch.float64)
    found, plain = collect(block, names, 100, [number]), block.linear_inputs()
    for name in names:
        assert torch.equal(found[name].tokens, plain[name])
        assert found[name].weights is not None
        assert found[name].weights.tolist() == [n for n in range(21) if n % 7]

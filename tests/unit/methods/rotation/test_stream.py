"""A rotated model computes what the model computed, whatever its architecture."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from qvlm.errors import UserError
from qvlm.methods.rotation.layer import rotate_layer
from qvlm.methods.rotation.stream import StreamRotation, rotate_ends
from qvlm.quantization.calibration import Walk
from qvlm.quantization.experts import unfuse_experts
from qvlm.quantization.spec import QuantizationConfig, QuantSpec
from tests.helpers.standins import tiny
from tests.helpers.toy import toy_batch, toy_llava

pytestmark = pytest.mark.instruction_set

TOYS = ("llama", "mixtral", "routed")  # grouped-query attention, fused experts, a router
FAMILIES = ("llava", "moe_llava", "moe_llava_phi2", "moe_llava_qwen")
NORMS = ("RMSNorm", "LayerNorm")


class ExactRMSNorm(nn.Module):
    """An RMS norm that does not compute in float32, as transformers' does."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)


def in_float64(model: nn.Module) -> nn.Module:
    """The model in float64, with gains and shifts that are far from one and zero."""
    unfuse_experts(model)
    model = model.double()
    torch.manual_seed(1)
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith(NORMS):
            nn.init.uniform_(module.weight, 0.2, 2)
            if getattr(module, "bias", None) is not None:
                nn.init.normal_(module.bias)
            if type(module).__name__.endswith("RMSNorm"):
                model.set_submodule(name, ExactRMSNorm(module))
        elif isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
    return model.requires_grad_(False).eval()


def tied_llava() -> nn.Module:
    """A LLaVA whose output head is its embedding, with a width that is no power of two."""
    toy = toy_llava().config
    text = {"hidden_size": 48, "intermediate_size": 56, "num_attention_heads": 4}
    text |= {"num_hidden_layers": 2, "vocab_size": 96, "tie_word_embeddings": True}
    config = LlavaConfig(
        vision_config=toy.vision_config,
        text_config=LlamaConfig(**text),
        image_token_id=toy.image_token_id,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    return model


def build(kind: str) -> nn.Module:
    model = tied_llava() if kind == "tied" else toy_llava(kind) if kind in TOYS else tiny(kind)
    return in_float64(model)


def batch(kind: str) -> dict[str, Tensor]:
    if kind in (*TOYS, "tied"):
        made = toy_batch(rows=3, seed=5)
        return {**made, "pixel_values": made["pixel_values"].double()}
    ids = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def rotate(model: nn.Module, heads: bool = True) -> None:
    rotation = rotate_ends(model)
    for layer in model.model.language_model.layers:
        rotate_layer(layer, rotation, heads, [], "a layer")


@pytest.mark.parametrize("kind", [*TOYS, "tied", *FAMILIES])
def test_logits_are_equal_within_the_rounding_of_float64(kind: str) -> None:
    model = build(kind)
    expected = model(**batch(kind)).logits
    ends = ("_proj", "fc1", "fc2", "dense")
    linears = {name: m for name, m in model.named_modules() if name.endswith(ends)}
    before = {name: linear.weight.clone() for name, linear in linears.items()}
    rotate(model)
    found = model(**batch(kind)).logits
    assert torch.allclose(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    same = {n for n, linear in linears.items() if torch.equal(linear.weight, before[n])}
    assert same == {name for name in linears if "vision_tower" in name}


@pytest.mark.parametrize("kind", ["llama", "moe_llava"])
def test_an_outlier_channel_of_the_stream_is_spread(kind: str) -> None:
    model = build(kind)
    layers = model.model.language_model.layers
    embedding = model.get_input_embeddings().weight
    embedding[:, 3] *= 100

    def largest() -> float:
        seen: list[Tensor] = []
        hook = layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        model(**batch(kind))
        hook.remove()
        energy = seen[0].square().mean((0, 1))
        return float(energy.max() / energy.mean())

    assert largest() > 15
    rotate(model)
    assert largest() < 8


@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("width", [32, 40, 48])
def test_the_rotation_is_orthogonal(width: int, keeps_mean: bool) -> None:
    rotation = StreamRotation(width, keeps_mean)
    eye = torch.eye(width, dtype=torch.float64)
    assert torch.allclose(rotation(eye) @ rotation(eye).T, eye, atol=1e-12)
    assert torch.allclose(rotation.undo(rotation(eye)), eye, atol=1e-12)
    ones = torch.ones(width, dtype=torch.float64)
    assert torch.allclose(rotation(ones), ones, atol=1e-12) == keeps_mean
    assert not torch.equal(rotation(eye), StreamRotation(width, keeps_mean, seed=1)(eye))


def test_a_tied_head_is_untied_and_norms_are_plain() -> None:
    model = build("tied")
    rotate(model)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert not model.config.tie_word_embeddings
    norms = [m for n, m in model.named_modules() if "language_model" in n and n.endswith("norm")]
    assert len(norms) == 5 and all(bool((norm.weight == 1).all()) for norm in norms)


def walk_calls(model: nn.Module) -> list[object]:
    spec = QuantSpec(4, "per_channel"), QuantSpec(4, "per_token"), QuantSpec(4, "per_token")
    walk = Walk(model, [toy_batch(image=False)], QuantizationConfig(*spec))
    block = next(block for block in walk.blocks() if block.kind == "language")
    return block.inputs


def test_a_layer_whose_norm_adds_one_to_its_weight_is_refused() -> None:
    """Gemma's norm has a gain of 1 + weight, which looks like any other norm."""

    class OnePlus(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.weight = nn.Parameter(norm.weight.clone().uniform_(-0.5, 0.5))

        def forward(self, x: Tensor) -> Tensor:
            return (1 + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    model = toy_llava().requires_grad_(False)
    layer = model.model.language_model.layers[0]
    calls, intact = walk_calls(model), copy.deepcopy(layer)
    rotation = StreamRotation(32, keeps_mean=False)
    rotate_layer(intact, rotation, True, calls, "a layer")  # the check accepts LLaMA's own
    layer.input_layernorm = OnePlus(layer.input_layernorm).requires_grad_(False)
    with pytest.raises(UserError, match=r"layers\.0 \(LlamaDecoderLayer\) cannot be rotated: it c"):
        rotate_layer(layer, rotation, True, calls, "layers.0")


def test_a_layer_of_an_unknown_structure_is_refused() -> None:
    layer = toy_llava().model.language_model.layers[0]
    del layer.input_layernorm
    with pytest.raises(UserError, match="no norm in front of"):
        rotate_layer(layer, StreamRotation(32, False), True, [], "layers.0")

"""Checks of the decoder for GPUs on a CPU under Triton's interpreter.

`test_decoder.py` runs this file in a process of its own with TRITON_INTERPRET=1.
"""

import copy

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from qvlm.errors import RunError, UserError
from qvlm.models.llava import Llava, LlavaArchitecture
from qvlm.packing import PackedLinear, force_kernel, packed_layers
from qvlm.packing.decoder import Decoder, launches
from qvlm.packing.decoder.joined import join, quantizes_alike
from qvlm.packing.kernels.triton_launch import TILES, Tile
from qvlm.packing.uncalibrated import quantize_uncalibrated
from qvlm.quantization import QuantSpec
from qvlm.quantization.targets import decoder_layers, quantizable


def tiny(kv_heads: int = 2) -> Llava:
    """Builds a LLaVA whose language model has two layers of two heads."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=61,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=kv_heads,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    built = LlavaArchitecture(vision_config=vision, text_config=text, image_token_id=60)
    return Llava(built).eval().requires_grad_(False)


def pack(model: Llava, normal_float: bool) -> None:
    """Packs weights in groups of 64. Layers of one input quantize it alike, in clusters of 64."""
    weight, inputs = QuantSpec(4, "per_group", 64), QuantSpec(4, "per_channel_group", 64)
    for layer in decoder_layers(model).values():
        for name, linear in quantizable(layer).items():
            torch.manual_seed(linear.in_features)
            quantized = quantize_uncalibrated(linear, weight, inputs, normal_float)
            layer.set_submodule(name, PackedLinear.from_quantized(quantized, "triton"))


@pytest.mark.parametrize(
    ("form", "batch", "prompt"),
    [
        ("float", 1, 20),
        ("float", 2, 5),
        ("uniform", 1, 5),
        ("uniform", 2, 3),
        ("normal_float", 1, 3),  # more rows would be multiplied in bf16
    ],
)
def test_a_decoder_says_what_the_model_says(
    form: str, batch: int, prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "KEYS", 8)  # so that there is more than one step
    # The interpreter's time grows with the number of programs, not with their size.
    for key in TILES:
        monkeypatch.setitem(TILES, key, Tile(64, 16 if key[0] == "many" else 2, 1, 1))
    model = tiny(kv_heads=2 if batch == 1 else 1)
    if form != "float":
        pack(model, form == "normal_float")
    reference = copy.deepcopy(model)
    if form != "float":
        force_kernel(reference, "reference")
    decoder = Decoder(model, batch, 26)
    ids = torch.randint(59, (batch, prompt))
    decoder.read(model.get_input_embeddings()(ids))
    for _ in range(2):
        expected = reference(input_ids=ids).logits[:, -1]
        torch.testing.assert_close(decoder.logits, expected, rtol=2e-3, atol=2e-4)
        ids = torch.cat([ids, decoder.ids[:, None]], 1)
        decoder.step()
    decoder.check()
    if form == "uniform":  # queries, keys and values were one product, and their parts still work
        assert not packed_layers(model)["model.language_model.layers.0.self_attn.q_proj"].used
    again = model(input_ids=ids[:, :-1]).logits
    torch.testing.assert_close(again, reference(input_ids=ids[:, :-1]).logits)


def test_layers_that_differ_in_their_inputs_are_not_joined() -> None:
    torch.manual_seed(0)
    weight, inputs = QuantSpec(4, "per_group", 64), QuantSpec(4, "per_channel_group", 64)
    linears = [torch.nn.Linear(128, 16) for _ in range(2)]
    packed = [
        PackedLinear.from_quantized(quantize_uncalibrated(each, weight, inputs, False))
        for each in linears
    ]
    assert not quantizes_alike(packed[0], packed[1])
    x = torch.randn(3, 128)
    for found, layer in zip(join(packed)(x), packed, strict=True):
        assert torch.equal(found, layer(x))


def test_what_does_not_fit_is_an_error() -> None:
    decoder = Decoder(tiny(), 1, 4)
    decoder.read(torch.randn(1, 4, 128))
    decoder.check()
    decoder.step()
    with pytest.raises(RunError, match="5 positions do not fit in a cache of 4"):
        decoder.check()
    decoder.logits[0, 3] = torch.nan
    decoder.position.zero_()
    with pytest.raises(RunError, match="logits are not finite"):
        decoder.check()
    other = tiny()
    other.model.language_model = torch.nn.Identity()
    with pytest.raises(UserError, match="Identity is not a LlamaModel"):
        Decoder.__init__(decoder, _Holds(torch.nn.Identity()), 1, 4)


class _Holds:
    """Stands for a model with some language model."""

    def __init__(self, language_model: torch.nn.Module) -> None:
        self.model = torch.nn.Module()
        self.model.language_model = language_model
        language_model.config = None  # type: ignore[assignment]

"""The first position in floating point: what stays exact, what is calibrated on, what is proven."""

import pytest
import torch

from qvlm.errors import RunError, UserError
from qvlm.methods.rtn import RTN
from qvlm.models.cache import CACHE
from qvlm.quantization import (
    QuantizationConfig,
    QuantLinear,
    QuantSpec,
    Walk,
    check_bits,
    expected_layers,
    measure_bits,
)
from tests.helpers.language_models import tiny_language_model


def config(granularity: str = "per_channel", first: str = "float") -> QuantizationConfig:
    """4 bits for everything."""
    return QuantizationConfig(
        QuantSpec(4, "per_channel"),
        QuantSpec(4, granularity),
        QuantSpec(4, "per_token"),
        first_token=first,
    )


def batch(rows: int = 3, tokens: int = 9) -> dict[str, torch.Tensor]:
    """Rows that all begin with bos."""
    ids = torch.randint(3, 14, (rows, tokens), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("granularity", ["per_channel", "per_token", "per_tensor"])
def test_only_the_first_position_is_exact(granularity: str) -> None:
    model = tiny_language_model()
    RTN().quantize(Walk(model, [batch()], config(granularity)))
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, QuantLinear)
    layer.register_forward_hook(lambda m, args, out: seen.update(q=(args[0], out)))
    with torch.no_grad():
        model(**batch())
    x, y = seen["q"]
    weight = layer.quantized_weight()
    if layer.input_quantizer.folds:
        weight = weight / layer.input_quantizer.scale
    exact = x @ weight.T
    assert torch.allclose(y[:, 0], exact[:, 0], atol=1e-5)
    assert not torch.allclose(y[:, 1:], exact[:, 1:], atol=1e-3)


def test_static_ranges_do_not_contain_it() -> None:
    ranges = {}
    for first in ("quantized", "float"):
        model = tiny_language_model()
        model.model.embed_tokens.weight.data[1] = 0.0
        model.model.embed_tokens.weight.data[1, 0] = 500.0  # after its norm, one huge channel
        RTN().quantize(Walk(model, [batch()], config("per_tensor", first)))
        ranges[first] = float(model.model.layers[0].self_attn.q_proj.input_quantizer.scale)
    assert ranges["float"] < ranges["quantized"]


def test_decoding_has_no_first_position_and_gives_the_same_logits() -> None:
    model = tiny_language_model()
    RTN().quantize(Walk(model, [batch()], config()))
    ids = batch()["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits[:, -1]
        cache = model(ids[:, :-1], use_cache=True)[CACHE]
        last = model(ids[:, -1:], **{CACHE: cache}).logits[:, -1]
    assert torch.allclose(whole, last, atol=1e-4)


def test_the_proof_counts_every_other_position() -> None:
    model = tiny_language_model()
    expected = expected_layers(model, vision_tower=True)
    RTN().quantize(Walk(model, [batch()], config()))
    assert check_bits(measure_bits(model, expected, [batch()], config())) == []
    layer = model.model.layers[1].mlp.down_proj
    layer.input_quantizer.forward = lambda x: x  # quantizes nothing
    layer.input_quantizer.centered = lambda x: x
    rows = measure_bits(model, expected, [batch()], config())
    assert check_bits(rows) == ["model.layers.1.mlp.down_proj"]


def test_ranges_of_a_prompt_contain_every_token() -> None:
    with pytest.raises(UserError, match="first_token=float is not possible"):
        config("per_channel_prompt")


def test_layers_that_are_not_told_positions_are_refused() -> None:
    model = tiny_language_model()
    RTN().quantize(Walk(model, [batch()], config()))
    layer = model.model.layers[0]
    with pytest.raises(RunError, match="not told the positions"):
        layer(torch.zeros(1, 3, model.config.hidden_size))

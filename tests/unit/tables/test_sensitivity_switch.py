"""Linears are switched to what they were before they were quantized, and back."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qvlm.methods.awq import AWQ
from qvlm.methods.base import Method
from qvlm.methods.gptq import GPTQ
from qvlm.methods.rotation.method import QuaRot
from qvlm.methods.rtn import RTN
from qvlm.methods.smoothquant import SmoothQuant
from qvlm.quantization import (
    QuantizationConfig,
    QuantLinear,
    QuantSpec,
    UniformQuantizer,
    expected_layers,
)
from qvlm.quantization.hadamard import hadamard_transform
from qvlm.tables.sensitivity.parts import (
    ACTIVATIONS,
    ALONE,
    BOTH,
    DEPTH,
    OTHERS,
    PART,
    STRETCHES,
    WEIGHTS,
    states_of,
)
from qvlm.tables.sensitivity.switch import KeepingWalk, quantized_only
from tests.helpers.toy import toy_batch, toy_batches, toy_llava


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**toy_batch(seed=5), use_cache=False).logits


def quantized(model: nn.Module, method: Method) -> dict[str, nn.Linear]:
    """Quantizes a toy and returns its float linears."""
    activation = QuantSpec(4, "per_token")
    config = QuantizationConfig(QuantSpec(4, "per_group", 16), activation, activation)
    walk = KeepingWalk(model, toy_batches(), config)
    method.quantize(walk)
    return walk.floats


METHODS = [RTN(), AWQ(n_grid=3, clip_grid=3), SmoothQuant(alpha=0.5), GPTQ(), QuaRot()]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_float_model_is_there_again(method: Method) -> None:
    model = toy_llava("routed")
    exact, expected = logits(model), expected_layers(model, True)
    floats = quantized(model, method)
    assert sorted(floats) == sorted(expected)
    rounded = logits(model)
    with quantized_only(model, floats, []):
        assert torch.allclose(logits(model), exact, atol=1e-4)
    with quantized_only(model, floats, floats):
        assert torch.equal(logits(model), rounded)
    assert torch.equal(logits(model), rounded)
    assert not torch.allclose(rounded, exact, atol=1e-2)


def test_the_model_is_quantized_again_after_an_error() -> None:
    model = toy_llava()
    floats = quantized(model, RTN())
    with pytest.raises(RuntimeError, match="broke"), quantized_only(model, floats, []):
        assert not any(isinstance(module, QuantLinear) for module in model.modules())
        raise RuntimeError("broke")
    assert all(isinstance(model.get_submodule(name), QuantLinear) for name in floats)


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("folds", [False, True])
def test_one_operand_of_a_product_is_float(folds: bool, hadamard: bool) -> None:
    random = torch.Generator().manual_seed(0)
    linear = nn.Linear(8, 5).double()
    x = torch.randn(3, 8, generator=random, dtype=torch.float64)
    read = hadamard_transform(x) if hadamard else x
    ends = read.abs().amax(0)
    inputs = UniformQuantizer.from_range(-ends, ends, 3, folds=folds)
    weights = UniformQuantizer.from_range(*(sign * torch.ones(1) for sign in (-1, 1)), 3)
    layer = QuantLinear.from_linear(linear, weights, inputs, hadamard=hadamard)
    model = nn.Sequential(layer)

    # What H rotates, and what is folded, taken back out in NumPy.
    rotation = hadamard_transform(torch.eye(8, dtype=torch.float64)).numpy()
    rotation = rotation if hadamard else np.eye(8)
    assert layer.weight is not None
    weight = layer.weight.numpy() / (inputs.scale.double().numpy() if folds else 1)
    float_weight = linear.weight.detach().numpy() @ rotation
    rounded = inputs.dequantize(inputs.quantize(read), torch.float64).numpy()
    bias = linear.bias.detach().numpy()
    for operands, expected in (
        (WEIGHTS, read.numpy() @ weight.T + bias),
        (ACTIVATIONS, rounded @ float_weight.T + bias),
        (BOTH, rounded @ weight.T + bias),
    ):
        with quantized_only(model, {"0": linear}, ["0"], operands):
            assert np.allclose(model(x).detach().numpy(), expected, atol=1e-5), operands


@pytest.mark.parametrize("text", ["llama", "routed"])
def test_parts_are_what_their_names_say(text: str) -> None:
    model = toy_llava(text, decoder_layers=2)
    layers = expected_layers(model, True)
    states = states_of(model, layers, True)
    alone = {s.part.name: s.layers for s in states if (s.quantized, s.operands) == (ALONE, BOTH)}
    children = {
        "attention": ("q_proj", "k_proj", "v_proj"),
        "attention output": ("o_proj",),
        "MLP": ("gate_proj", "up_proj"),
        "MLP output": ("down_proj",),
    }
    for name, ends in children.items():
        assert alone[name] == {x for x in layers if "language" in x and x.endswith(ends)}
    assert alone["vision tower"] == {x for x in layers if "vision_tower" in x}
    assert alone["projector"] == {x for x in layers if "multi_modal_projector" in x}
    assert alone["everything"] == set(layers)
    assert alone["nothing"] == set()
    assert ("experts" in alone) == (text == "routed")
    assert alone.get("experts", set()) == {x for x in layers if ".experts." in x}
    for level in (PART, DEPTH):
        parts = {s.part.name: s for s in states if s.part.level == level and s.quantized == OTHERS}
        assert all(state.layers == set(layers) - state.part.layers for state in parts.values())
    depths = [name for name in alone if name.startswith(("tower", "decoder"))]
    assert depths == ["tower 0", "tower 1", "tower 2", "decoder 0", "decoder 1"]
    assert len({state.name for state in states}) == len(states)


def test_many_layers_are_taken_together() -> None:
    model = toy_llava(decoder_layers=19)
    layers = expected_layers(model, False)
    states = states_of(model, layers, False)
    parts = [s.part for s in states if s.part.level == DEPTH and s.quantized == ALONE]
    assert len(parts) == STRETCHES
    assert parts[0].name == "decoder 0-1"
    assert parts[-1].name.endswith("-18")
    sizes = [len(part.layers) for part in parts]
    assert set(sizes) == {2 * 7, 3 * 7}
    assert sum(sizes) == 19 * 7
    assert "vision tower" not in {state.part.name for state in states}

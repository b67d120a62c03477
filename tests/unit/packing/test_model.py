"""Packed models: every layer is replaced, logits stay the same, and memory shrinks."""

import pytest

from qvlm.errors import UserError
from qvlm.packing.model import kernels_used, pack_model, packed_layers, weight_bytes
from qvlm.quantization.linear import QuantLinear
from tests.helpers.layers import logits, rounded
from tests.helpers.toy import toy_llava

pytestmark = pytest.mark.instruction_set


@pytest.mark.parametrize("text", ["llama", "routed", "mixtral"])
def test_every_quantized_linear_is_packed(text: str) -> None:
    model = rounded(4, text)
    names = {name for name, part in model.named_modules() if isinstance(part, QuantLinear)}
    before = weight_bytes(model)
    assert pack_model(model) == len(names)
    assert set(packed_layers(model)) == names
    assert not any(isinstance(part, QuantLinear) for part in model.modules())
    assert weight_bytes(model) < before / 2


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_logits_are_those_of_the_simulation(bits: int) -> None:
    model = rounded(bits)
    expected = logits(model)
    pack_model(model, "reference")
    # An input near the middle of two codes may round to the other one, so there is no exact bound.
    assert float((logits(model) - expected).abs().max()) < 0.02 * float(expected.abs().max())
    assert set(kernels_used(model)) == {"reference"}


def test_a_forced_kernel_runs_where_it_can() -> None:
    model = rounded()
    pack_model(model, "int_mm")
    logits(model)
    assert set(kernels_used(model)) == {"int_mm"}


def test_models_that_cannot_be_packed_are_refused() -> None:
    with pytest.raises(UserError, match="no quantized linear"):
        pack_model(toy_llava())
    with pytest.raises(UserError, match="serves no layer of this model"):
        pack_model(rounded(8), "int4_weight_only")
    with pytest.raises(UserError, match="'fast' is not a kernel. Choose one of: auto, native"):
        pack_model(rounded(8), "fast")

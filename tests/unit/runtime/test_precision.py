"""A half-precision model on a CPU that multiplies it slowly is told to use float32."""

import warnings

import pytest

from qvlm.cell import inputs
from qvlm.runtime import precision
from tests.helpers.configs import load


@pytest.mark.parametrize(
    ("dtype", "device", "ratio", "said"),
    [
        ("bfloat16", "cpu", 7.9, True),
        ("float16", "cpu", 1.6, True),
        ("float16", "cpu", 1.4, False),
        ("bfloat16", "cpu", 0.6, False),
        ("float32", "cpu", 7.9, False),
        ("bfloat16", "cuda:0", 7.9, False),
    ],
)
def test_float32_is_advised_where_it_is_faster(
    dtype: str, device: str, ratio: float, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "slowdown", lambda _: ratio)
    sentence = precision.advice(dtype, device)
    assert (sentence is not None) == said
    assert sentence is None or f"{ratio:.1f} times" in sentence
    assert sentence is None or "model.dtype=float32" in sentence


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_is_measured_is_a_ratio(dtype: str) -> None:
    assert 0 < precision.slowdown(dtype) < 1000


def test_a_cell_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "slowdown", lambda _: 7.9)
    for words in (["model.dtype=bfloat16"], ["model.dtype=float32"]):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            inputs.load(load("model=mini_llava", "method=fp", *words), "cpu")
        said = [str(each.message) for each in found if "7.9 times" in str(each.message)]
        assert len(said) == ("model.dtype=bfloat16" in words)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the map may put every layer on a GPU
        config = load("model=mini_llava", "method=fp", "model.dtype=bfloat16", "device=map")
        inputs.load_for_streaming(config, "cpu")

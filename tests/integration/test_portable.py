"""The embedded models come out the same whatever instructions and threads a CPU offers."""

import pytest

from qvlm.tables.portable import settings
from qvlm.tables.portable.settings import SETTINGS, differences, outcomes
from qvlm.tables.portable.worker import Outcome

# Small searches of every method. Answers are few for each cell, and 208 of all cells together.
METHODS = (
    ["method=rtn"],
    ["method=qlora"],
    ["method=awq", "method.n_grid=3", "method.clip_grid=6"],
    ["method=layerwise", "method.percentiles=[1.0,0.99]", "method.search_tokens=128"],
    ["method=zeroquant"],
    ["method=smoothquant", "method.n_grid=3"],
    ["method=roco"],  # rotates, weighs tokens and rounds by GPTQ
    [
        *("method=qvlm", "method.percentiles=[1.0,0.99]", "method.search_tokens=128"),
        *("method.veo_epochs=1", "method.mining_tokens=64"),
    ],
)
SMALL = ["calibration.samples=4", "evaluation.limit=13"]
CELLS = [
    [f"model={model}", *method, *SMALL]
    for model in ("mini_llava", "mini_moe_llava")
    for method in METHODS
]


@pytest.mark.endurance
def test_codes_and_answers_are_those_of_any_instruction_set_and_number_of_threads() -> None:
    reference = list(outcomes(SETTINGS[0], CELLS))
    assert all(outcome.candidates > 0 for outcome in reference if "method=awq" in outcome.cell)
    assert sum(len(outcome.answers["simulated"]) for outcome in reference) >= 200
    found = {tuple(outcome.cell): differences(outcome, outcome) for outcome in reference}
    assert not {cell: unequal for cell, unequal in found.items() if unequal}  # packed: no other
    narrow = SETTINGS[-1]  # no vector instructions, compatible products, two threads
    for expected, outcome in zip(reference, outcomes(narrow, CELLS, packed="none"), strict=True):
        assert differences(expected, outcome) == [], (narrow.name, outcome.cell)


def test_what_differs_is_named() -> None:
    one = Outcome(["a"], {"x": "1", "y": "2"}, {"simulated": ["A", "B"]}, 3)
    other = Outcome(["a"], {"x": "1", "y": "3"}, {"simulated": ["A", "C"]}, 4)
    assert differences(one, one) == []
    assert differences(one, other) == [
        "1 of 2 tensors, first y",
        "4 candidates instead of 3",
        "1 of 2 answers, simulated",
    ]
    packed = Outcome(["a"], dict(one.tensors), {**one.answers, "packed, int_mm": ["B", "B"]}, 3)
    assert differences(packed, packed) == ["1 of 2 answers, packed, int_mm"]


def test_settings_differ_in_what_cpus_differ_in() -> None:
    used = [variable for setting in SETTINGS for variable in setting.environment.items()]
    assert {setting.threads for setting in settings.SETTINGS} == {1, 2}
    for variable in (
        ("ATEN_CPU_CAPABILITY", "default"),
        ("ATEN_CPU_CAPABILITY", "avx2"),
        ("MKL_CBWR", "COMPATIBLE"),
        ("ONEDNN_MAX_CPU_ISA", "SSE41"),
    ):
        assert variable in used

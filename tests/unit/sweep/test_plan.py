"""A sweep is named after what it sweeps over."""

import pytest

from qvlm.sweep.plan import sweep_name
from qvlm.validation import check_name


@pytest.mark.parametrize(
    ("combinations", "name"),
    [
        ([["method=rtn", "bits=w4a4"]], "cells"),
        ([["method=awq", "bits=w4a4"], ["method=qvlm", "bits=w4a4"]], "method-awq-qvlm_bits-w4a4"),
        ([["seed=0", "threads=1"], ["seed=1", "threads=1"]], "seed-0-1"),
        ([["quantizer.p=0.5"], ["quantizer.p=2"]], "quantizer.p-0.5-2"),
        ([["model.path=/a b"], ["model.path=/c"]], "model.path-a-b-c"),
        ([["+x=a"], ["+x=ä"]], "x-a"),
        ([["seed=0"], ["seed=0"]], "cells"),
    ],
)
def test_the_name_says_what_varies(combinations: list[list[str]], name: str) -> None:
    assert sweep_name(combinations) == name


def test_a_name_is_always_accepted() -> None:
    long = [[f"data.source=/very/long/path/{'x' * index}"] for index in range(90)]
    check_name("group", sweep_name(long))

"""Rows that have finished leave the batch, and the others answer as if they had not."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from qvlm.evaluation import decoding
from qvlm.evaluation.decoding import decode
from qvlm.models.float64 import compute_in_float64
from tests.helpers.problems import make_model, make_problems


def answers(limit: int, sample: bool = False) -> tuple[Tensor, list[list[int]]]:
    """Tokens of twelve rows, and the rows of each call of `generate`."""
    loaded = make_model()
    compute_in_float64(loaded.model)
    inputs = loaded.encode(make_problems(12, seed=1))
    asked: list[list[int]] = []

    def options(rows: list[int]) -> dict[str, Any]:
        asked.append(rows)
        return {"do_sample": sample, "pad_token_id": loaded.tokenizer.pad_token_id}

    torch.manual_seed(3)
    with torch.inference_mode():
        tokens = decode(loaded.model, inputs, limit, loaded.tokenizer.eos_token_id, options)
    return tokens, asked[1:]


@pytest.mark.parametrize("limit", [1, 4, 12])
def test_answers_are_those_of_a_batch_that_nobody_leaves(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, calls = answers(limit)
    monkeypatch.setattr(decoding, "LEAVING", 2.0)
    expected, one = answers(limit)
    assert torch.equal(found, expected)
    assert one == [list(range(12))]
    if limit == 12:
        assert len(calls) > 2
        for before, after in pairwise(calls):
            assert {*after} < {*before} and len(after) <= 0.75 * len(before)


def test_sampling_is_the_same_each_time() -> None:
    assert torch.equal(answers(8, sample=True)[0], answers(8, sample=True)[0])

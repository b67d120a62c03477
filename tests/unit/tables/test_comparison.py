"""Methods are compared on the questions that both answered."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from qvlm.evaluation.metrics import mcnemar
from qvlm.records.record import Record, find_records
from qvlm.tables.comparison import compare, paired
from qvlm.tables.report import p_value
from qvlm.tables.selection import select
from tests.helpers.pages import cells, section, table2_page
from tests.helpers.records import make_record


def test_methods_are_compared_question_by_question(runs: Path) -> None:
    """Against scipy's binomial test on counts taken with a merge."""
    methods = {"RTN": 60.0, "AWQ": 64.0, "Layer-wise": 70.0, "Q-VLM": 72.0}
    records = [
        make_record(runs, method, accuracy=accuracy, seed=index)
        for index, (method, accuracy) in enumerate(methods.items())
    ]
    by_method = {record.method: record.predictions for record in records}
    ((lead, (made, impossible)),) = compare(records).items()
    assert lead == "Q-VLM"
    assert impossible == []
    assert [(c.first, c.second) for c in made] == [
        ("Q-VLM", name) for name in ("RTN", "AWQ", "Layer-wise")
    ]
    for c in made:
        merged = by_method[c.first].merge(by_method[c.second], on="question_id")
        only_first = int((merged["correct_x"] & ~merged["correct_y"]).sum())
        only_second = int((~merged["correct_x"] & merged["correct_y"]).sum())
        assert (c.test.only_a, c.test.only_b) == (only_first, only_second)
        oracle = binomtest(only_first, only_first + only_second).pvalue
        assert c.test.p_value == pytest.approx(oracle)
        assert c.p_holm >= c.test.p_value
        difference = 100 * (merged["correct_x"].mean() - merged["correct_y"].mean())
        assert c.difference.difference == pytest.approx(difference)
        assert c.difference.low < difference < c.difference.high
    smallest = min(made, key=lambda c: c.test.p_value)
    assert smallest.p_holm == pytest.approx(3 * smallest.test.p_value)
    assert smallest.verdict == "Q-VLM ahead"
    lines = section(table2_page(runs), "### mini_llava, W4A4").splitlines()
    (row,) = (cells(line) for line in lines if line.startswith("| Q-VLM - RTN "))
    (c,) = (c for c in made if c.second == "RTN")
    assert row[3:5] == [str(c.test.only_a), str(c.test.only_b)]
    assert float(row[1]) == pytest.approx(c.difference.difference, abs=0.006)
    assert float(row[6]) == pytest.approx(c.p_holm, rel=0.5, abs=6e-5)


def test_without_qvlm_everything_is_compared_with_the_baseline(runs: Path) -> None:
    for method, accuracy in (("RTN", 80), ("AWQ", 50), ("QLoRA", 80)):
        make_record(runs, method, accuracy=accuracy)
    made, _ = compare(select(find_records(runs)).shown)["RTN"]
    assert [(c.first, c.second, c.verdict) for c in made] == [
        ("AWQ", "RTN", "RTN ahead"),
        ("QLoRA", "RTN", "not told apart"),
    ]
    assert made[1].test.p_value == 1
    assert "| AWQ - RTN " in table2_page(runs)


def test_ours_is_compared_with_every_other_method(runs: Path) -> None:
    methods = ("RTN", "Q-VLM", "GPTQ", "RoCo", "RoCo, per token")
    records = [make_record(runs, method, seed=at) for at, method in enumerate(methods)]
    found = compare(records)
    assert list(found) == ["Q-VLM", "RoCo", "RoCo, per token"]
    for lead, (made, _) in found.items():
        assert {(c.first, c.second) for c in made} == {
            (lead, other) for other in methods if other != lead
        }
    lines = table2_page(runs).splitlines()
    first = [cells(line)[0] for line in lines if line.startswith("| *not") or "| measured" in line]
    assert first.index("*not in the paper*") == first.index("**Q-VLM**") + 1


def test_one_method_is_compared_with_nothing(runs: Path) -> None:
    make_record(runs)
    assert "There are no two methods to compare." in table2_page(runs)


def test_different_questions_are_not_compared(runs: Path) -> None:
    """By identity of the questions, whatever their order."""
    first, second = make_record(runs, "RTN"), make_record(runs, "AWQ", n=200)
    assert paired(first, second) is None
    _, impossible = compare([first, second])["RTN"]
    assert impossible == ["AWQ and RTN were not asked the same questions"]
    second.predictions.loc[:, "question_id"] = [f"test-{i + 1}" for i in range(200)]
    assert paired(first, second) is None
    same = make_record(runs, "QLoRA", seed=4)
    before = paired(first, same)
    assert before is not None
    shuffled = same.predictions.sample(frac=1, random_state=0)
    again = Record(same.path, same.config, same.run, same.metrics, shuffled, same.layers)
    after = paired(first, again)
    assert after is not None
    assert np.array_equal(before, after)
    relabeled = same.predictions.assign(answer=(same.predictions["answer"] + 1) % 3)
    other = Record(same.path, same.config, same.run, same.metrics, relabeled, same.layers)
    assert paired(first, other) is None


def test_a_p_value_is_never_shown_as_zero() -> None:
    beyond = mcnemar([True] * 5000, [False] * 5000).p_value
    assert [p_value(value) for value in (beyond, 3e-5, 1e-4, 1.0)] == [
        *("<1e-300", "3e-05", "0.0001", "1.0000"),
    ]

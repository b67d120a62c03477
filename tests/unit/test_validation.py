"""Every check accepts what it should, and refuses the rest in one sentence of one form."""

from collections.abc import Callable
from math import inf, nan
from typing import Any

import pytest

from qvlm import validation
from qvlm.errors import UserError


@pytest.mark.parametrize(
    ("check", "value", "sentence"),
    [
        (lambda v: validation.one_of("k", v, ("a", "b")), "c", "k=c is not a known value. Choose"),
        (lambda v: validation.one_of("k", v, ("a", "b")), None, "Choose one of: a, b."),
        (lambda v: validation.switch("k", v), "true", "Choose one of: true, false."),
        (lambda v: validation.switch("k", v), 1, "k=1 is not a switch."),
        (lambda v: validation.whole_number("k", v), 0, "k=0 is not a whole number of at least 1."),
        (lambda v: validation.whole_number("k", v), 1.0, "k=1.0 is not a whole number"),
        (lambda v: validation.whole_number("k", v), True, "k=true is not a whole number"),
        (lambda v: validation.whole_number("k", v, 2, 8), 9, "a whole number from 2 to 8."),
        (lambda v: validation.whole_number("k", v, 2, 8), None, "k=null is not a whole number"),
        (lambda v: validation.number("k", v), -1, "k=-1 is not a finite number of at least 0."),
        (lambda v: validation.number("k", v), inf, "k=inf is not a finite number"),
        (lambda v: validation.number("k", v), nan, "k=nan is not a finite number"),
        (lambda v: validation.number("k", v), True, "k=true is not a finite number"),
        (lambda v: validation.number("k", v, 0, 1), 1.5, "a finite number from 0 to 1."),
        (lambda v: validation.positive("k", v), 0, "k=0 is not a finite number above 0."),
        (lambda v: validation.positive("k", v), "1", "k=1 is not a finite number above 0."),
    ],
)
def test_a_refusal_is_one_sentence(
    check: Callable[[Any], None], value: object, sentence: str
) -> None:
    with pytest.raises(UserError) as refusal:
        check(value)
    assert str(refusal.value).startswith("k=")
    assert sentence in str(refusal.value)


def test_what_is_in_range_is_accepted() -> None:
    validation.one_of("k", "a", ("a", "b"))
    validation.switch("k", False)
    validation.whole_number("k", 0, 0)
    validation.whole_number("k", 8, 2, 8)
    validation.number("k", 0)
    validation.number("k", 1, 0, 1)
    validation.positive("k", 1e-9)


@pytest.mark.parametrize("name", ["mini_llava", "Q-VLM.2", "a", "-", "_", "9", "x" * 64])
def test_names_are_accepted(name: str) -> None:
    validation.check_name("model.name", name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            ".",
            "..",
            ".hidden",
            "a/b",
            "/etc",
            "../up",
            "a\\b",
            "a b",
            "a\n",
            "\n",
            "a\0b",
            "é",
        ),
        *("x" * 65, "a:b", "~", "$HOME", "a*", "a,b", "a=b", "\u0661"),
    ],
)
def test_what_is_not_a_name_is_one_sentence(name: str) -> None:
    with pytest.raises(
        UserError, match=r"^model.name: .+ is not a name\. Use letters, digits"
    ) as no:
        validation.check_name("model.name", name)
    assert "\n" not in str(no.value)

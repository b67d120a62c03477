"""Prompts word for word as LLaVA's conversion writes them, and answers by the official rule."""

import pytest

from qvlm.errors import UserError
from qvlm.prompts import Prompting

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
PROBLEM = {
    "image": None,
    "question": "Which is a gas?",
    "choices": ["air", "a rock"],
    "answer": 0,
    "hint": "",
    "lecture": "Gases fill their box.",
    "solution": "The only gas here is air.",
}
PICTURED = {**PROBLEM, "image": object(), "hint": "Look at the boxes."}


def test_text_only_prompt_is_the_official_one() -> None:
    assert Prompting().prompt(PROBLEM) == (
        f"{SYSTEM} USER: Which is a gas?\nContext: N/A\nOptions: (A) air (B) a rock ASSISTANT:"
    )


def test_image_token_comes_first() -> None:
    assert Prompting().prompt(PICTURED) == (
        f"{SYSTEM} USER: <image>\nWhich is a gas?\nContext: Look at the boxes.\n"
        "Options: (A) air (B) a rock ASSISTANT:"
    )


def test_direct_format_asks_for_the_letter() -> None:
    assert Prompting("CQM-A").prompt(PICTURED) == (
        f"{SYSTEM} USER: <image>\nContext: Look at the boxes.\nQuestion: Which is a gas?\n"
        "Options: (A) air (B) a rock\n"
        "Answer with the option's letter from the given choices directly. ASSISTANT:"
    )


@pytest.mark.parametrize(
    ("format", "target"),
    [
        ("QCM-LEA", " Gases fill their box. The only gas here is air. The answer is A.</s>"),
        (
            "QCM-LEPA",
            " LECTURE: Gases fill their box.\nSOLUTION: The only gas here is air.\n"
            "###\nANSWER: A.</s>",
        ),
        ("CQM-A", " A</s>"),
    ],
)
def test_targets(format: str, target: str) -> None:
    assert Prompting(format).target(PROBLEM) == target


def test_target_without_lecture_has_no_double_blank() -> None:
    bare = {**PROBLEM, "lecture": ""}
    assert Prompting().target(bare) == " The only gas here is air. The answer is A.</s>"


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("It is air. The answer is A.", 0),
        (" The answer is B. ", 1),
        ("B", 1),
        ("B. a rock", 1),
        ("The answer is C.", None),  # only two choices
        ("The answer is A. The answer is B.", None),  # not exactly one
        ("The answer is A. The answer is A.", None),
        ("the answer is a.", None),
        ("", None),
        ("AB", None),
    ],
)
def test_official_parser(text: str, choice: int | None) -> None:
    assert Prompting().parse(text, 2) == choice


def test_plain_layout_has_its_own_pattern() -> None:
    assert Prompting("QCM-LEPA").parse("SOLUTION: air.\n###\nANSWER: A.", 2) == 0
    assert Prompting("QCM-LEPA").parse("The answer is A.", 2) is None


@pytest.mark.parametrize("option", ["format", "conversation"])
def test_unknown_names_are_refused_with_the_accepted_ones(option: str) -> None:
    with pytest.raises(UserError, match=r"'nonsense': accepted are .*(QCM-LEA|vicuna_v1)"):
        Prompting(**{option: "nonsense"})

"""Prompts word for word as LLaVA's conversion writes them, and answers by the official rule."""

import pytest

from qvlm.data.prompts import Prompting
from qvlm.errors import UserError

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


# Problems with the oddities of the real ones, and what LLaVA's conversion makes of them: double
# blanks become one (three become two), borders are stripped, the label of the question vanishes
# wherever it stands, and a literal `<image>` is taken out of the text.
ODD = {
    "image": object(),
    "question": " Select the  fish below.",
    "choices": ["green moray eel ", "  manta   ray", "cardinalfish"],
    "answer": 2,
    "hint": "Fish live underwater.\nQuestion: what is a fish? See <image>. ",
    "lecture": "Birds have feathers.\n\nFish have fins.\n",
    "solution": "",
}


@pytest.mark.parametrize(
    ("format", "conversation", "prompt", "target"),
    [
        (
            "QCM-LEA",
            "vicuna_v1",
            f"{SYSTEM} USER: <image>\nSelect the fish below.\n"
            "Context: Fish live underwater.\nwhat is a fish? See .\n"
            "Options: (A) green moray eel (B)  manta  ray (C) cardinalfish ASSISTANT:",
            " Birds have feathers.\n\nFish have fins.\n The answer is C.</s>",
        ),
        (
            "QCM-LEPA",
            "llava_v1",
            "A chat between a curious human and an artificial intelligence assistant. The "
            "assistant gives helpful, detailed, and polite answers to the human's questions. "
            "USER: <image>\nSelect the fish below.\n"
            "Context: Fish live underwater.\nwhat is a fish? See .\n"
            "Options: (A) green moray eel (B)  manta  ray (C) cardinalfish ASSISTANT:",
            " LECTURE: Birds have feathers.\n\nFish have fins.\n\n###\nANSWER: C.</s>",
        ),
        (
            "CQM-A",
            "stablelm",
            f"{SYSTEM} USER: <image>\nContext: Fish live underwater.\n"
            "Question: what is a fish? See .\nQuestion: Select the fish below.\n"
            "Options: (A) green moray eel (B)  manta  ray (C) cardinalfish\n"
            "Answer with the option's letter from the given choices directly. ASSISTANT:",
            " C<|endoftext|>",
        ),
    ],
)
def test_recorded_problem_word_for_word(
    format: str, conversation: str, prompt: str, target: str
) -> None:
    prompting = Prompting(format, conversation)
    assert prompting.prompt(ODD) == prompt
    assert prompting.target(ODD) == target


def test_the_end_of_a_turn_is_the_templates() -> None:
    ends = [Prompting(conversation=c).end for c in ("vicuna_v1", "llava_v1", "stablelm")]
    assert ends == ["</s>", "</s>", "<|endoftext|>"]


@pytest.mark.parametrize("conversation", ["phi", "qwen"])
def test_moe_llavas_templates_are_one_text(conversation: str) -> None:
    one, other = Prompting("CQM-A", conversation), Prompting("CQM-A", "stablelm")
    assert (one.prompt(ODD), one.target(ODD)) == (other.prompt(ODD), other.target(ODD))


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


@pytest.mark.parametrize(
    ("text", "choice"), [("F. the sixth. The answer is A.", 0), ("F", None), ("J", None)]
)
def test_letters_beyond_the_official_five_need_as_many_choices(
    text: str, choice: int | None
) -> None:
    assert Prompting().parse(text, 3) == choice
    assert Prompting().parse("F", 6) == 5
    assert Prompting().parse("F. the sixth", 6) == 5


def test_reasoning_formats_have_room_for_a_lecture() -> None:
    rooms = {name: Prompting(name).max_new_tokens for name in ("QCM-LEA", "QCM-LEPA", "CQM-A")}
    assert rooms["QCM-LEA"] == rooms["QCM-LEPA"] == 1024
    assert rooms["CQM-A"] < 1024


def test_plain_layout_has_its_own_pattern() -> None:
    assert Prompting("QCM-LEPA").parse("SOLUTION: air.\n###\nANSWER: A.", 2) == 0
    assert Prompting("QCM-LEPA").parse("The answer is A.", 2) is None


@pytest.mark.parametrize("option", ["format", "conversation"])
def test_unknown_names_are_refused_with_the_accepted_ones(option: str) -> None:
    with pytest.raises(
        UserError, match=r"'nonsense' is not known. Choose one of: .*(QCM-LEA|vicuna_v1)"
    ):
        Prompting(**{option: "nonsense"})


def test_a_conversation_is_written_in_the_template_of_the_checkpoint() -> None:
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c?"},
    ]
    vicuna = Prompting(conversation="vicuna_v1")
    text = vicuna.chat(said)
    assert text.endswith(" USER: Be brief.\n\na? ASSISTANT: b</s>USER: c? ASSISTANT:")
    begun = [*said, {"role": "assistant", "content": "d"}]
    assert vicuna.chat(begun, answer_follows=False) == f"{text} d"
    problem = {"question": "q", "choices": ["x"], "hint": "", "image": None}
    request = vicuna.prompt(problem).partition("USER: ")[2].removesuffix(" ASSISTANT:")
    assert vicuna.chat([{"role": "user", "content": request}]) == vicuna.prompt(problem)
    smollm2 = Prompting("CQM-A", "smollm2").chat(said[1:])
    assert smollm2.endswith(
        "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc?<|im_end|>\n<|im_start|>assistant\n"
    )

"""How a ScienceQA problem becomes text for the model, and how the model's text becomes a choice.

Two things make a prompt: the *format*, which orders question, context, options and the parts of the
answer (named as in the ScienceQA code: Q question, C context, M multiple choices, L lecture,
E explanation, A answer, P "plain" layout on separate lines), and the *conversation* template of the
checkpoint. A checkpoint answers well only with the pair that it was tuned on, so both live in one
object that belongs to the model, and an unknown name is refused at construction.

Source: `convert_sqa_to_llava*.py`, `conversation.py` and `eval_science_qa.py` of the LLaVA release,
and of MoE-LLaVA's.
Its templates carry no few-shot examples and no captions; neither do ours.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qvlm.errors import UserError

IMAGE_TOKEN = "<image>"
LETTERS = "ABCDE"

_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_DIRECT = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class _Format:
    question_first: bool
    instruction: str
    answer_pattern: str


_FORMATS = {
    "QCM-LEA": _Format(True, "", r"The answer is ([A-Z])."),
    "QCM-LEPA": _Format(True, "", r"ANSWER: ([A-Z])."),
    "CQM-A": _Format(False, _DIRECT, r"The answer is ([A-Z])."),
}

# name -> (system sentence, role of the user, role of the model, end of the model's turn)
_CONVERSATIONS = {
    "vicuna_v1": (_SYSTEM, "USER", "ASSISTANT", "</s>"),
    "llava_v1": (_SYSTEM.replace("user", "human"), "USER", "ASSISTANT", "</s>"),
    "stablelm": (_SYSTEM, "USER", "ASSISTANT", "<|endoftext|>"),
    "phi": (_SYSTEM, "USER", "ASSISTANT", "<|endoftext|>"),
    "qwen": (_SYSTEM, "USER", "ASSISTANT", "<|endoftext|>"),
}


@dataclass(frozen=True)
class Prompting:
    """The prompt format and conversation template of one checkpoint.

    Args:
        format: "QCM-LEA", "QCM-LEPA" or "CQM-A".
        conversation: "vicuna_v1", "llava_v1" (which says "human" for "user"), or one of MoE-LLaVA's
            "stablelm", "phi" and "qwen", which are the same text.

    Raises:
        UserError: for any other name.
    """

    format: str = "QCM-LEA"
    conversation: str = "vicuna_v1"

    def __post_init__(self) -> None:
        for option, value, known in (
            ("format", self.format, _FORMATS),
            ("conversation", self.conversation, _CONVERSATIONS),
        ):
            if value not in known:
                raise UserError(
                    f"unknown prompt {option} {value!r}: accepted are {', '.join(sorted(known))}"
                )

    @property
    def end(self) -> str:
        """What ends the model's turn: the end-of-text token of the tokenizer it belongs to."""
        return _CONVERSATIONS[self.conversation][3]

    def prompt(self, problem: Mapping[str, Any]) -> str:
        """Everything the model reads before it answers; `<image>` stands once if there is one."""
        system, user, assistant, _ = _CONVERSATIONS[self.conversation]
        image = f"{IMAGE_TOKEN}\n" if problem["image"] is not None else ""
        return f"{system} {user}: {image}{self._request(problem)} {assistant}:"

    def target(self, problem: Mapping[str, Any]) -> str:
        """The answer that the model is tuned to write, from the blank after the role to the end."""
        letter = LETTERS[problem["answer"]]
        lecture, solution = problem["lecture"], problem["solution"]
        if self.format == "CQM-A":
            text = letter
        elif self.format == "QCM-LEPA":
            labels = (("LECTURE", lecture), ("SOLUTION", solution))
            reasons = "".join(f"{label}: {text}\n" for label, text in labels if text.strip())
            text = _tidy(f"{reasons}###\nANSWER: {letter}.")
        else:
            text = _tidy(f"Answer: {lecture} {solution} The answer is {letter}.")
            text = text.replace("Answer: ", "")
        return f" {text}{self.end}"

    def parse(self, text: str, n_choices: int) -> int | None:
        """The index of the choice that `text` names, or None where the official rule finds none.

        The official rule: the text is one letter, or begins with a letter, a full stop and a blank,
        or holds the answer sentence exactly once; a letter beyond the choices names none.
        """
        text = text.strip()
        if text in LETTERS and len(text) == 1:
            letter = text
        elif len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
            letter = text[0]
        else:
            found = re.findall(_FORMATS[self.format].answer_pattern, text)
            letter = found[0] if len(found) == 1 else ""
        index = LETTERS.find(letter) if letter else -1
        return index if 0 <= index < n_choices else None

    def _request(self, problem: Mapping[str, Any]) -> str:
        form = _FORMATS[self.format]
        options = " ".join(
            f"({LETTERS[i]}) {choice}" for i, choice in enumerate(problem["choices"])
        )
        question = f"Question: {problem['question']}"
        context = f"Context: {problem['hint'].strip() or 'N/A'}"
        head = (question, context) if form.question_first else (context, question)
        text = _tidy("\n".join([*head, f"Options: {options}"]))
        if form.question_first:
            text = text.replace("Question: ", "")
        text = text.replace(IMAGE_TOKEN, "").strip()
        return f"{text}\n{form.instruction}" if form.instruction else text


def _tidy(text: str) -> str:
    """The conversion's own tidying, quirk included: three blanks become two."""
    return text.replace("  ", " ").strip()

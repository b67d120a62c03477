"""How a ScienceQA problem becomes text for the model, and how the model's text becomes a choice.

A prompt has two parts. The *format* orders question, context, options and the parts of the answer.
Its name is that of the ScienceQA code: Q question, C context, M multiple choices, L lecture,
E explanation, A answer, P "plain" layout on separate lines. The *conversation* template belongs to
the checkpoint. A checkpoint answers well only with the pair that it was tuned with, so one object
holds both.

Source: `convert_sqa_to_llava*.py`, `conversation.py` and `eval_science_qa.py` of LLaVA's and
MoE-LLaVA's releases. Their templates have no few-shot examples and no captions; neither do ours.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qvlm.errors import UserError

IMAGE_TOKEN = "<image>"
# A problem has at most ten choices. The official code knows the first five letters only, which
# suffice for ScienceQA.
LETTERS = "ABCDEFGHIJ"
OFFICIAL_LETTERS = LETTERS[:5]

_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_DIRECT = "Answer with the option's letter from the given choices directly."


_LETTER = "([A-Z])"  # what stands for the letter in a pattern


@dataclass(frozen=True)
class _Format:
    question_first: bool
    instruction: str
    answer_pattern: str
    max_new_tokens: int


# Of the published answers of LLaVA-v1.3-13B, which reasons before it names a letter, 99.9 % are
# whole within 1,024 tokens, and 17.5 % within 64. An answer in the direct format is a letter or
# "The answer is A."
_FORMATS = {
    "QCM-LEA": _Format(True, "", r"The answer is ([A-Z]).", 1024),
    "QCM-LEPA": _Format(True, "", r"ANSWER: ([A-Z]).", 1024),
    "CQM-A": _Format(False, _DIRECT, r"The answer is ([A-Z]).", 64),
}


@dataclass(frozen=True)
class _Conversation:
    before: str  # what stands before the request
    after: str  # what stands between the request and the answer
    end: str  # what ends the answer
    lead: str = " "  # what begins the answer
    turn: str = "USER: "  # what stands between an answer and the next request


def _vicuna(system: str, end: str) -> _Conversation:
    return _Conversation(f"{system} USER: ", " ASSISTANT:", end)


# The template that SmolLM2's tokenizer carries, with its own system sentence.
_SMOLLM2 = _Conversation(
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|>",
    lead="",
    turn="\n<|im_start|>user\n",
)
CHAT = "chat"  # the template that a checkpoint's own processor has
_CONVERSATIONS = {
    CHAT: _Conversation("", "", "", lead=""),
    "vicuna_v1": _vicuna(_SYSTEM, "</s>"),
    "llava_v1": _vicuna(_SYSTEM.replace("user", "human"), "</s>"),
    "stablelm": _vicuna(_SYSTEM, "<|endoftext|>"),
    "phi": _vicuna(_SYSTEM, "<|endoftext|>"),
    "qwen": _vicuna(_SYSTEM, "<|endoftext|>"),
    "smollm2": _SMOLLM2,
}


@dataclass(frozen=True)
class Prompting:
    """The prompt format and conversation template of one checkpoint.

    Args:
        format: Name of the prompt format, "QCM-LEA", "QCM-LEPA" or "CQM-A".
        conversation: Name of the template: "vicuna_v1", "llava_v1" (which says "human" instead of
            "user"), "stablelm", "phi" or "qwen" of MoE-LLaVA, which are the same text, or
            "smollm2".

    Raises:
        UserError: If a name is not known.
    """

    format: str = "QCM-LEA"
    conversation: str = "vicuna_v1"

    def __post_init__(self) -> None:
        for option, value, known in (
            ("model.prompt_format", self.format, _FORMATS),
            ("model.conversation", self.conversation, _CONVERSATIONS),
        ):
            if value not in known:
                raise UserError(
                    f"{option}: {value!r} is not known. Choose one of: {', '.join(sorted(known))}."
                )

    @property
    def end(self) -> str:
        """Text that ends the model's turn: the end-of-text token of its tokenizer."""
        return _CONVERSATIONS[self.conversation].end

    @property
    def max_new_tokens(self) -> int:
        """Number of tokens within which an answer in this format is complete."""
        return _FORMATS[self.format].max_new_tokens

    @property
    def lead(self) -> str:
        """Text that begins the model's turn."""
        return _CONVERSATIONS[self.conversation].lead

    def around(self, pictures: int) -> tuple[str, str]:
        """Returns the texts before and after a request with so many pictures."""
        conversation = _CONVERSATIONS[self.conversation]
        return conversation.before + f"{IMAGE_TOKEN}\n" * pictures, conversation.after

    def prompt(self, problem: Mapping[str, Any]) -> str:
        """Returns the text before the answer, with one `<image>` if the problem has an image."""
        before, after = self.around(len(pictures_of(problem["image"])))
        return f"{before}{self.request(problem)}{after}"

    def target(self, problem: Mapping[str, Any]) -> str:
        """Returns the answer that the model is tuned to write, with the blank that begins it.

        As in the request, a literal `<image>` is removed.
        """
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
        return f"{self.lead}{text.replace(IMAGE_TOKEN, '')}{self.end}"

    def answers(self, problem: Mapping[str, Any]) -> list[str]:
        """Returns the answer that names each choice and nothing else, in the model's own words."""
        sentence = _FORMATS[self.format].answer_pattern if self.format != "CQM-A" else _LETTER
        return [
            self.lead + sentence.replace(_LETTER, letter)
            for letter in LETTERS[: len(problem["choices"])]
        ]

    def chat(self, messages: Sequence[Mapping[str, str]], answer_follows: bool = True) -> str:
        """Returns the text of a conversation that the model is to go on with.

        Args:
            messages: Mappings with the keys `role` and `content`. What a system or a user says
                before the next answer is one request, of several paragraphs.
            answer_follows: Whether the model begins an answer. Otherwise it goes on with the last
                one of `messages`.
        """
        conversation = _CONVERSATIONS[self.conversation]
        text, request = conversation.before, []
        for message in messages:
            if message["role"] != "assistant":
                request.append(message["content"])
                continue
            asked = "\n\n".join(request) + conversation.after + conversation.lead
            text += f"{asked}{message['content']}{conversation.end}{conversation.turn}"
            request = []
        if answer_follows:
            return text + "\n\n".join(request) + conversation.after
        return text.removesuffix(conversation.end + conversation.turn)

    def parse(self, text: str, n_choices: int) -> int | None:
        """Returns the index of the choice that a text names by the official rule, or None.

        By that rule the text is one letter, or begins with a letter, a full stop and a blank, or
        holds the answer sentence exactly once. A letter beyond the choices names no choice.

        Args:
            text: Generated answer.
            n_choices: Number of choices of the problem.
        """
        text = text.strip()
        letters = LETTERS[: max(n_choices, len(OFFICIAL_LETTERS))]
        if len(text) == 1 and text in letters:
            letter = text
        elif len(text) >= 3 and text[0] in letters and text[1:3] == ". ":
            letter = text[0]
        else:
            found = re.findall(_FORMATS[self.format].answer_pattern, text)
            letter = found[0] if len(found) == 1 else ""
        index = LETTERS.find(letter) if letter else -1
        return index if 0 <= index < n_choices else None

    def request(self, problem: Mapping[str, Any]) -> str:
        """Returns the text of a question with its context and options."""
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


def guess(question_id: str, n_choices: int, seed: int) -> int:
    """Draws the choice that replaces an unparsable answer.

    The draw depends on the question and the seed alone, so two methods that both fail on a question
    get the same choice.
    """
    return random.Random(f"{seed}/{question_id}").randrange(n_choices)


def pictures_of(image: Any) -> list[Any]:
    """Returns the pictures of a problem, whose `image` is a picture, a list of them, or None."""
    if image is None:
        return []
    return list(image) if isinstance(image, list | tuple) else [image]


def _tidy(text: str) -> str:
    """Removes double blanks as the conversion does, by which three blanks become two."""
    return text.replace("  ", " ").strip()

"""Skills of the miniature, and how a draft becomes a problem in ScienceQA's schema.

A skill drafts a question with its right option, wrong options and reasoning. Here the options are
shuffled, and the reasoning ends with the right one, so that a model finds the answer's letter by
looking up the text that it has just written.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from PIL import Image

NAMES = (
    *(
        "Ana",
        "Beth",
        "Cora",
        "Dina",
        "Emma",
        "Faye",
        "Gina",
        "Hana",
        "Iris",
        "Jane",
        "Kira",
        "Lena",
    ),
    *("Abe", "Bob", "Carl", "Dan", "Evan", "Finn", "Greg", "Hugo", "Ivan", "Jack", "Kurt", "Leo"),
)
GIRLS, BOYS = NAMES[:12], NAMES[12:]


@dataclass(frozen=True)
class Draft:
    """A question before its options are shuffled. `reason` ends just before the right option."""

    question: str
    right: str
    wrong: Sequence[str]
    reason: str
    hint: str = ""
    image: Image.Image | None = None


@dataclass(frozen=True)
class Skill:
    """A kind of question.

    Attributes:
        name: Value of the `skill` column.
        subject, topic, category, lecture: Values of these columns.
        weight: Share of a split in percent.
        grades: Lowest and highest grade.
        make: Function that drafts one question.
    """

    name: str
    subject: str
    topic: str
    category: str
    weight: float
    grades: tuple[int, int]
    lecture: str
    make: Callable[[Random], Draft]

    def problem(self, rng: Random) -> dict[str, Any]:
        """Draws one problem with the columns of the hub's data set."""
        draft = self.make(rng)
        choices = [draft.right, *draft.wrong]
        rng.shuffle(choices)
        return {
            "image": draft.image,
            "question": draft.question,
            "choices": choices,
            "answer": choices.index(draft.right),
            "hint": draft.hint,
            "task": "closed choice",
            "grade": f"grade{rng.randint(*self.grades)}",
            "subject": self.subject,
            "topic": self.topic,
            "category": self.category,
            "skill": self.name,
            "lecture": self.lecture,
            "solution": f"{draft.reason} {draft.right}.",
        }


def pick_others(rng: Random, pool: Sequence[str], right: str, count: int) -> list[str]:
    """Draws `count` wrong options from a pool; no two options begin with the same word."""
    others: list[str] = []
    used = {right.split()[0]}
    for option in rng.sample(list(pool), len(pool)):
        if option.split()[0] not in used:
            used.add(option.split()[0])
            others.append(option)
        if len(others) == count:
            return others
    raise ValueError(f"no {count} wrong options beside {right!r} in a pool of {len(pool)}")

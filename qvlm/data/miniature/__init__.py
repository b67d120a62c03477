"""The miniature's data: generated problems like ScienceQA's, with answers that can be checked.

There are 29 skills modeled on ScienceQA's, in `natural`, `social` and `language`. They are mixed so
that the shares of subjects, images and hints are close to the real test split. The number of
problems is unlimited. A hash of the rendered problem decides which split it belongs to, so the
splits are disjoint for all seeds. Only numpy and Pillow are needed.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from qvlm.data.miniature import language, natural, social
from qvlm.data.miniature.skill import Skill

Problem = dict[str, Any]

SKILLS: dict[str, Skill] = {
    skill.name: skill for skill in (*natural.SKILLS, *social.SKILLS, *language.SKILLS)
}
SPLITS = {"train": range(0, 70), "validation": range(70, 80), "test": range(80, 100)}
_PATIENCE = 400  # rejected draws in a row after which a skill counts as exhausted


def words(text: str) -> list[str]:
    """Splits a text into words, single digits and punctuation, as the tokenizer does."""
    return re.findall(r"[A-Za-z']+|[0-9]|[^\sA-Za-z0-9]", text)


def fingerprint(problem: Problem) -> str:
    """Returns the SHA-256 of everything that a model is shown of a problem, and of its answer."""
    digest = hashlib.sha256()
    shown = (problem["question"], problem["hint"], *problem["choices"], str(problem["answer"]))
    digest.update("\x1f".join(shown).encode())
    if problem["image"] is not None:
        digest.update(problem["image"].tobytes())
    return digest.hexdigest()


def split_of(problem: Problem) -> str:
    """Returns the split that a problem belongs to by its fingerprint: 70, 10 and 20 %."""
    bucket = int(fingerprint(problem)[:12], 16) % 100
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


def stream(split: str, seed: int, skills: Sequence[str] | None = None) -> Iterator[Problem]:
    """Yields problems of a split without end. Skills are drawn by weight; problems may repeat.

    Args:
        split: "train", "validation" or "test".
        seed: Seed of all draws.
        skills: Names of the skills to draw from; None draws from all.
    """
    _check(split)
    rng = Random(f"stream-{split}-{seed}")
    chosen = [SKILLS[name] for name in (SKILLS if skills is None else skills)]
    weights = [skill.weight for skill in chosen]
    while True:
        problem = rng.choices(chosen, weights)[0].problem(rng)
        if split_of(problem) == split:
            yield problem


def generate(split: str, count: int, seed: int = 0) -> list[Problem]:
    """Returns `count` different problems of a split, shuffled, with exact shares of the skills.

    Raises:
        ValueError: If the split is unknown, the count is negative, or a skill has too few problems.
    """
    _check(split)
    if count < 0:
        raise ValueError(f"cannot generate {count} problems: the count must not be negative")
    problems: list[Problem] = []
    for skill, share in zip(SKILLS.values(), _shares(count), strict=True):
        rng = Random(f"generate-{split}-{seed}-{skill.name}")
        seen: set[str] = set()
        rejected = 0
        while len(seen) < share:
            problem = skill.problem(rng)
            key = fingerprint(problem)
            if key in seen or split_of(problem) != split:
                rejected += 1
                if rejected > _PATIENCE:
                    raise ValueError(
                        f"{split} has no {share} different problems of skill {skill.name!r}"
                    )
                continue
            rejected = 0
            seen.add(key)
            problems.append(problem)
    Random(f"order-{split}-{seed}").shuffle(problems)
    return problems


def vocabulary() -> list[str]:
    """Returns all words that occur in the texts of problems, sorted."""
    rng = Random("vocabulary")
    found: set[str] = set("0123456789")
    for skill in SKILLS.values():
        for _ in range(1500):
            problem = skill.problem(rng)
            texts = (problem["question"], problem["hint"], *problem["choices"])
            for text in (*texts, problem["lecture"], problem["solution"]):
                found.update(words(text))
    return sorted(found)


def _check(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not known. Choose one of: {', '.join(SPLITS)}.")


def _shares(count: int) -> list[int]:
    """Divides `count` among the skills by weight; the largest remainders are rounded up."""
    total = sum(skill.weight for skill in SKILLS.values())
    exact = [count * skill.weight / total for skill in SKILLS.values()]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for index in by_remainder[: count - sum(shares)]:
        shares[index] += 1
    return shares

"""The miniature's data: generated problems like ScienceQA's, with answers that can be checked.

There are 29 skills modeled on ScienceQA's, in `natural`, `social` and `language`. They are mixed so
that the shares of subjects, images and hints are close to the real test split. The number of
problems is unlimited. A hash of the rendered problem decides which split it belongs to, so the
splits are disjoint for all seeds. Only numpy and Pillow are needed.
"""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from qvlm.data.miniature import language, natural, social
from qvlm.data.miniature.skill import Skill

Problem = dict[str, Any]

SKILLS: dict[str, Skill] = {
    skill.name: skill for skill in (*natural.SKILLS, *social.SKILLS, *language.SKILLS)
}
SPLITS = ("train", "validation", "test", "claims")
# First bucket of each split, of a hundred, for problems without and with an image. Nothing was ever
# tuned on "claims", which decides about the paper's claims. Of problems without an image it has
# few, because some skills have hardly more different ones than the test split needs.
_BUCKETS = {False: (0, 70, 80, 97, 100), True: (0, 70, 80, 90, 100)}
# Rejected draws in a row after which a skill is exhausted: the smaller a split, the more.
_PATIENCE = {"train": 400, "validation": 3000, "test": 2000, "claims": 10_000}


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
    """Returns the split that a problem belongs to by its fingerprint."""
    return _split(fingerprint(problem), problem["image"] is not None)


def stream(split: str, seed: int, skills: Sequence[str] | None = None) -> Iterator[Problem]:
    """Yields problems of a split without end. Skills are drawn by weight; problems may repeat.

    Args:
        split: One of `SPLITS`.
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

    The split "claims" asks for more problems than some skills have. Such a skill gives all that it
    has, and the other skills share the rest by weight.

    Raises:
        ValueError: If the split is unknown, the count is negative, or there are too few problems.
    """
    _check(split)
    if count < 0:
        raise ValueError(f"cannot generate {count} problems: the count must not be negative")
    found: dict[str, dict[str, Problem]] = {name: {} for name in SKILLS}
    draws = {name: Random(f"generate-{split}-{seed}-{name}") for name in SKILLS}
    open_skills = list(SKILLS)
    while missing := count - sum(map(len, found.values())):
        exhausted = [
            name
            for name, share in zip(open_skills, _shares(missing, open_skills), strict=True)
            if not _add(found[name], share, split, SKILLS[name], draws[name])
        ]
        if exhausted and (split != "claims" or len(exhausted) == len(open_skills)):
            raise ValueError(f"{split} has too few different problems of skill {exhausted[0]!r}")
        open_skills = [name for name in open_skills if name not in exhausted]
    problems = [problem for own in found.values() for problem in own.values()]
    Random(f"order-{split}-{seed}").shuffle(problems)
    return problems


def _add(found: dict[str, Problem], share: int, split: str, skill: Skill, rng: Random) -> bool:
    """Adds new problems of a skill by their fingerprints, and returns whether there were enough."""
    rejected, wanted = 0, len(found) + share
    patience = _PATIENCE[split]
    while len(found) < wanted and rejected <= patience:
        problem = skill.problem(rng)
        key = fingerprint(problem)
        if key in found or _split(key, problem["image"] is not None) != split:
            rejected += 1
        else:
            rejected = 0
            found[key] = problem
    return len(found) == wanted


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


def _split(key: str, has_image: bool) -> str:
    """Returns the split of a fingerprint."""
    bucket = int(key[:12], 16) % 100
    return SPLITS[bisect_right(_BUCKETS[has_image], bucket) - 1]


def _check(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not known. Choose one of: {', '.join(SPLITS)}.")


def _shares(count: int, names: Sequence[str]) -> list[int]:
    """Divides `count` among skills by weight; the largest remainders are rounded up."""
    weights = [SKILLS[name].weight for name in names]
    exact = [count * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for index in by_remainder[: count - sum(shares)]:
        shares[index] += 1
    return shares

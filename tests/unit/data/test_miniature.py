"""The generator against oracles of its own: pixels, alphabets, shares, hashes."""

import hashlib
from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from qvlm.data import miniature
from qvlm.data.miniature import language, natural, social
from qvlm.data.miniature.draw import COLORS
from qvlm.data.miniature.skill import pick_others

pytestmark = pytest.mark.slow

SCHEMA = {
    *("image", "question", "choices", "answer", "hint", "task", "grade", "subject", "topic"),
    *("category", "skill", "lecture", "solution"),
}


@pytest.fixture(scope="module")
def problems() -> list[dict[str, Any]]:
    return miniature.generate("test", 4000)


def of_skill(problems: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    found = [p for p in problems if p["skill"] == name]
    assert len(found) >= 75
    return found


def right(problem: dict[str, Any]) -> str:
    return problem["choices"][problem["answer"]]


def color_at(problem: dict[str, Any], x: int, y: int) -> str:
    """The named color nearest to the mean of the 3 x 3 pixels around a point."""
    pixels = np.asarray(problem["image"])[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).mean(0)
    return min(COLORS, key=lambda name: float(((np.array(COLORS[name]) - pixels) ** 2).sum()))


def test_schema_is_the_hubs(problems: list[dict[str, Any]]) -> None:
    for problem in problems:
        assert set(problem) == SCHEMA
        assert 2 <= len(problem["choices"]) <= 5
        assert 1 <= int(problem["grade"].removeprefix("grade")) <= 12
        if problem["image"] is not None:
            assert (problem["image"].size, problem["image"].mode) == ((48, 48), "RGB")


def test_class_shares_are_near_the_real_test_split(problems: list[dict[str, Any]]) -> None:
    shares = Counter(p["subject"] for p in problems)
    shares["IMG"] = sum(p["image"] is not None for p in problems)
    shares["TXT"] = sum(p["hint"] != "" for p in problems)
    shares["NO"] = sum(p["image"] is None and p["hint"] == "" for p in problems)
    real = {"natural science": 53, "social science": 21, "language science": 26}
    real |= {"IMG": 48, "TXT": 48, "NO": 33}
    for name, share in real.items():
        assert 100 * shares[name] / len(problems) == pytest.approx(share, abs=1.5)
    assert len({p["skill"] for p in problems}) >= 20


def test_splits_are_disjoint_on_the_rendered_problem_whatever_the_seed() -> None:
    rendered: dict[str, set[str]] = {}
    for split in miniature.SPLITS:
        rendered[split] = set()
        for seed in (0, 7):
            for p in miniature.generate(split, 800, seed):
                content = repr((p["question"], p["hint"], p["choices"], p["answer"])).encode()
                content += p["image"].tobytes() if p["image"] is not None else b""
                rendered[split].add(hashlib.md5(content).hexdigest())
    for one, other in combinations(miniature.SPLITS, 2):
        assert not rendered[one] & rendered[other]


def test_a_large_claims_split_fills_up_what_rare_skills_lack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A skill with few different problems gives all of them, and the others share the rest."""
    rare, common = "Dominant and recessive alleles", "Synonyms and antonyms"
    some = {name: miniature.SKILLS[name] for name in (rare, common)}
    monkeypatch.setattr(miniature, "SKILLS", some)
    problems = miniature.generate("claims", 300)
    assert len({miniature.fingerprint(p) for p in problems}) == 300
    assert {miniature.split_of(p) for p in problems} == {"claims"}
    assert 10 < Counter(p["skill"] for p in problems)[rare] < 40
    with pytest.raises(ValueError, match=f"test has too few different problems of skill {rare!r}"):
        miniature.generate("test", 1000)


def test_no_problem_stands_twice(problems: list[dict[str, Any]]) -> None:
    assert len({miniature.fingerprint(p) for p in problems}) == len(problems) == 4000


def test_equal_seeds_give_equal_problems() -> None:
    one, other = (miniature.generate("validation", 200, seed=4) for _ in range(2))
    assert [miniature.fingerprint(p) for p in one] == [miniature.fingerprint(p) for p in other]
    third = miniature.generate("validation", 200, seed=5)
    assert [p["question"] for p in one] != [p["question"] for p in third]


def test_letters_are_uniform_for_each_number_of_choices(problems: list[dict[str, Any]]) -> None:
    for count in (2, 3, 4):
        answers = Counter(p["answer"] for p in problems if len(p["choices"]) == count)
        total = sum(answers.values())
        for letter in range(count):
            assert answers[letter] / total == pytest.approx(1 / count, abs=0.05)


def test_reasoning_ends_with_the_right_option(problems: list[dict[str, Any]]) -> None:
    for problem in problems:
        assert problem["solution"].endswith(f" {right(problem)}.")
        heads = [choice.split()[0] for choice in problem["choices"]]
        assert len(set(heads)) == len(heads)


def test_vocabulary_holds_every_word() -> None:
    known = set(miniature.vocabulary())
    assert 300 < len(known) < 1200
    for split in miniature.SPLITS:
        for problem in miniature.generate(split, 1500, seed=9):
            texts = (problem["question"], problem["hint"], problem["lecture"], problem["solution"])
            for text in (*texts, *problem["choices"]):
                assert set(miniature.words(text)) <= known


def test_exhausted_skill_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two skills that draw no image: one with few different problems, one with many.
    few, many = "Physical and chemical change", "Synonyms and antonyms"
    monkeypatch.setattr(miniature, "SKILLS", {name: miniature.SKILLS[name] for name in (few, many)})
    assert len(miniature.generate("validation", 100)) == 100
    with pytest.raises(
        ValueError, match=f"validation has too few different problems of skill '{few}'"
    ):
        miniature.generate("validation", 400)


def test_unknown_split_is_an_error() -> None:
    with pytest.raises(ValueError, match="Choose one of: train, validation, test"):
        next(miniature.stream("dev", 0))


def test_too_small_a_pool_is_an_error() -> None:
    from random import Random

    with pytest.raises(ValueError, match="pool of 3"):
        pick_others(Random(0), ["a b", "a c", "d"], "a x", 2)


def test_alphabet(problems: list[dict[str, Any]]) -> None:
    for problem in of_skill(problems, "Put words in alphabetical order"):
        ordered = sorted(problem["choices"])
        assert right(problem) == (ordered[0] if "first" in problem["question"] else ordered[-1])
    assert len({word[0] for word in language.ORDERED}) == len(language.ORDERED)


def test_magnets_by_the_colors_of_the_facing_poles(problems: list[dict[str, Any]]) -> None:
    for problem in of_skill(problems, "Predict magnet forces"):
        lying = color_at(problem, 7, 24) in ("red", "blue")
        points = ((17, 24), (31, 24)) if lying else ((24, 17), (24, 31))
        poles = [color_at(problem, *point) for point in points]
        assert set(poles) <= {"red", "blue"}
        assert right(problem) == ("repel" if poles[0] == poles[1] else "attract")


def test_map_markers_by_their_pixels(problems: list[dict[str, Any]]) -> None:
    spots = {"north": (24, 6), "south": (24, 41), "west": (6, 24), "east": (41, 24)}
    for problem in of_skill(problems, "Read a map: cardinal directions"):
        asked = problem["question"].rstrip("?").split()[-1]
        assert color_at(problem, *spots[asked]) == right(problem)


def test_bars_by_their_pixels(problems: list[dict[str, Any]]) -> None:
    for problem in of_skill(problems, "Read a bar chart"):
        heights = {}
        for x in range(9, 9 + 15 * len(problem["choices"]), 15):
            color = color_at(problem, x, 42)
            column = np.asarray(problem["image"])[:, x].astype(int)
            heights[color] = int((np.abs(column - COLORS[color]) < 12).all(-1).sum())
        pick = max if "tallest" in problem["question"] else min
        assert right(problem) == pick(heights, key=lambda c: heights[c])


def test_concentration_by_counting_pixels(problems: list[dict[str, Any]]) -> None:
    for problem in of_skill(problems, "Compare concentrations"):
        color = np.array(COLORS[problem["hint"].split("Each ")[1].split()[0]])
        near = (np.abs(np.asarray(problem["image"]).astype(int) - color) < 12).all(-1)
        left, right_ = near[:, :24].sum(), near[:, 24:].sum()
        if right(problem) == "neither beaker":
            assert max(left, right_) < 3 * min(left, right_)
        else:
            assert right(problem) == ("left beaker" if left > right_ else "right beaker")
            assert max(left, right_) >= 3 * min(left, right_)


def test_genotypes(problems: list[dict[str, Any]]) -> None:
    for problem in of_skill(problems, "Dominant and recessive alleles"):
        kind = problem["question"].split(" with ")[1].split()[0]
        letter = problem["hint"].split("Allele ")[1].split()[0]
        dominant = problem["hint"].split(f"Allele {letter} for ")[1].split(" is dominant")[0]
        assert (right(problem) == dominant) == (letter in kind)


def test_temperatures(problems: list[dict[str, Any]]) -> None:
    for problem in of_skill(problems, "Temperature and particle speed"):
        words = problem["hint"].replace(".", "").split()
        degrees = {words[1]: int(words[4]), words[8]: int(words[11])}
        pick = max if "faster" in problem["question"] else min
        assert right(problem) == pick(degrees, key=lambda gas: degrees[gas])


@pytest.mark.parametrize(
    "groups",
    [natural.GROUPS.values(), natural.THINGS.values(), natural.UNITS.values(), language.RHYMES],
)
def test_facts_belong_to_one_group_only(groups: Any) -> None:
    entries = [entry for group in groups for entry in group]
    assert len(set(entries)) == len(entries)


def test_distractors_of_word_relations_are_never_right_too() -> None:
    words = [word for pair in (*language.SAME, *language.OPPOSITE) for word in pair]
    assert len(set(words)) == len(words)
    assert len(set(social.CAPITALS.values())) == len(social.CAPITALS)

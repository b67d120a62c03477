"""The questions of the report: which are shown, and what every model answered.

Records hold answers, not questions, so the questions are read again from the data set that the
records name. Only generated problems may be passed on. The texts of any other data set are left out
unless the caller asks for a page that stays on this machine.
"""

import base64
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import pandas as pd

from qvlm.data.images import to_rgb
from qvlm.data.prompts import LETTERS
from qvlm.data.scienceqa import load_scienceqa
from qvlm.evaluation.metrics import CLASSES
from qvlm.records.record import Record
from qvlm.report.content import Content
from qvlm.tables.labels import bits_order

GENERATED = "miniature"
LEAST = 240  # questions, where the data has that many
PER_METHOD = 10  # questions that full precision had right and a method had wrong
LARGEST = 320  # pixels of the longer side; larger images are scaled down
SMALL_BYTES = 8192  # a PNG of up to this size is embedded as it is

RULE = (
    "Of each skill the first questions of the split, as many of each as make {least} together. "
    "Then for each method and bit width the first {per_method} questions that full precision "
    "answers correctly and the method does not. No question is chosen by hand."
)


WITHHELD = (
    "Their texts and images are not in this page, because the data set may not be passed on with "
    "it. The option --private writes a page with them that stays on this machine."
)
CHANGED = (
    "The data set is not the one that was asked: its questions or their right answers have changed "
    "since. Run the cells again to see them."
)


@dataclass(frozen=True)
class Answer:
    """What one record answered.

    Attributes:
        run: Number of the record.
        letter: Letter of the choice, or "-" if the text names none.
        correct: Whether it counts as correct.
        text: Generated text.
    """

    run: int
    letter: str
    correct: bool
    text: str


@dataclass(frozen=True)
class Question:
    """A question with its answers.

    Attributes:
        id: Name of the question in the records.
        classes: Names of the classes that it belongs to.
        skill, hint, text: Skill, context and question.
        choices: Choices in order.
        answer: Letter of the right choice.
        image: Image as a data URI, or "".
        size: Width and height of the image in pixels.
        answers: Answer of each record that was asked, by the record's number.
    """

    id: str
    classes: Sequence[str]
    skill: str
    hint: str
    text: str
    choices: Sequence[str]
    answer: str
    image: str
    size: tuple[int, int]
    answers: Mapping[int, Answer]


@dataclass(frozen=True)
class Asked:
    """The questions of one data set.

    Attributes:
        title: Name of the data set and its split.
        records: Records that were asked them.
        total: Number of questions that were asked.
        missing: Why the questions are not shown, or "".
        questions: Chosen questions.
        bits: Labels of the bit widths, the columns of the answers.
        matrix: Rows of the answers by model: the method, and per column the number of the record
            or None.
    """

    title: str
    records: Sequence[Record]
    total: int
    missing: str
    questions: Sequence[Question] = ()
    bits: Sequence[str] = ()
    matrix: Mapping[str, Sequence[tuple[str, Sequence[int | None]]]] = field(default_factory=dict)


def asked(content: Content, private: bool = False) -> list[Asked]:
    """Returns the questions of each data set that the shown records of whole methods answered.

    Args:
        content: Records of the report.
        private: Whether the page stays on this machine, so that it may hold any data set's texts.

    Raises:
        UserError: If a data set cannot be read again.
    """
    groups: defaultdict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in content.whole.shown:
        data, limit = record.config["data"], record.config["evaluation"]["limit"]
        source = data.get("source", data["name"])
        groups[data["name"], source, data["split"], limit, data["seed"]].append(record)
    found = []
    for (name, source, split, limit, seed), records in groups.items():
        title, total = f"{name}, split {split}", len(records[0].predictions)
        if source != GENERATED and not private:
            found.append(Asked(title, records, total, WITHHELD))
            continue
        problems = load_scienceqa(source, split, limit, seed)
        same = [record for record in records if _asked_these(record, problems)]
        if not same:
            found.append(Asked(title, records, total, CHANGED))
            continue
        by_id = {str(problem): row for row, problem in enumerate(problems["question_id"])}
        answers = {n: _answers(r, n) for r in same for n in [content.numbers[r.name]]}
        classes = _classes(same[0].predictions)
        questions = [
            _question(
                problems[by_id[name]],
                classes[name],
                {number: own[name] for number, own in answers.items()},
            )
            for name in choose(same)
        ]
        bits, matrix = _matrix(same, content)
        found.append(Asked(title, same, total, "", questions, bits, matrix))
    return found


def _asked_these(record: Record, problems: datasets.Dataset) -> bool:
    """Whether a record's questions are these: the same names, skills and right answers."""
    frame = record.predictions
    columns = [name for name in ("question_id", "skill", "answer") if name in frame]
    asked = zip(*(map(str, frame[name]) for name in columns), strict=True)
    there = zip(*(map(str, problems[name]) for name in columns), strict=True)
    return {*asked} <= {*there}


def _matrix(
    records: Sequence[Record], content: Content
) -> tuple[list[str], dict[str, list[tuple[str, list[int | None]]]]]:
    """Returns the columns and rows in which a question shows the answers of the records."""
    ordered = sorted({record.bit_widths for record in records}, key=bits_order)
    columns = [bits.label for bits in ordered]
    runs = {(r.model, r.method, r.bits): content.numbers[r.name] for r in records}
    matrix: dict[str, list[tuple[str, list[int | None]]]] = {}
    for model, method in dict.fromkeys((record.model, record.method) for record in records):
        row = [runs.get((model, method, bits)) for bits in columns]
        matrix.setdefault(model, []).append((method, row))
    return columns, matrix


def choose(
    records: Sequence[Record], least: int = LEAST, per_method: int = PER_METHOD
) -> list[str]:
    """Chooses questions by the rule that the page states.

    Args:
        records: Records that were asked the same questions.
        least: Number of questions that are spread over the skills, at most.
        per_method: Number of questions per record that full precision had right and it had wrong.

    Returns:
        Names of the questions, in the order of the split.
    """
    first = records[0].predictions
    order = list(map(str, first["question_id"]))
    skills: defaultdict[str, list[str]] = defaultdict(list)
    for name, skill in zip(order, first.get("skill", pd.Series("", first.index)), strict=True):
        skills[str(skill)].append(name)
    chosen: set[str] = set()
    depth = 0
    while len(chosen) < least and any(len(names) > depth for names in skills.values()):
        layer = [names[depth] for names in skills.values() if len(names) > depth]
        chosen |= set(layer[: least - len(chosen)])
        depth += 1
    right = {
        record.model: _right(record) for record in records if record.bit_widths.is_full_precision
    }
    for record in records:
        own = _right(record)
        lost = [n for n in order if n in right.get(record.model, ()) and n not in own]
        chosen |= set(lost[:per_method])
    return [name for name in order if name in chosen]


def _right(record: Record) -> set[str]:
    frame = record.predictions
    return set(map(str, frame["question_id"][frame["correct"].astype(bool)]))


def _answers(record: Record, number: int) -> dict[str, Answer]:
    """Returns the answers of a record by the name of the question."""
    columns = (
        record.predictions[name] for name in ("question_id", "prediction", "correct", "text")
    )
    return {
        str(name): Answer(
            number,
            "-" if pd.isna(choice) else LETTERS[int(choice)],
            bool(correct),
            str(text).strip(),
        )
        for name, choice, correct, text in zip(*columns, strict=True)
    }


def _classes(frame: pd.DataFrame) -> dict[str, list[str]]:
    """Returns the classes that each question belongs to, by the name of the question."""
    members = {name: of(frame).tolist() for name, of in CLASSES.items() if name != "Avg"}
    return {
        str(question): [name for name, member in members.items() if member[row]]
        for row, question in enumerate(frame["question_id"])
    }


def _question(
    problem: Mapping[str, Any], classes: Sequence[str], answers: Mapping[int, Answer]
) -> Question:
    image, size = _embedded(problem["image"])
    return Question(
        str(problem["question_id"]),
        classes,
        problem["skill"],
        problem["hint"].strip(),
        problem["question"],
        problem["choices"],
        LETTERS[problem["answer"]],
        image,
        size,
        answers,
    )


def _embedded(image: Any) -> tuple[str, tuple[int, int]]:
    """Returns an image as a data URI, scaled down if it is large, and its size in pixels."""
    if image is None:
        return "", (0, 0)
    picture = to_rgb(image)
    picture.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    kind = "png"
    if buffer.tell() > SMALL_BYTES:
        buffer, kind = io.BytesIO(), "jpeg"
        picture.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{kind};base64,{data}", picture.size

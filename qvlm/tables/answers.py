"""Committed answers: what a page cites, in one small file per cell, so that anyone can check it.

    results/answers/<page>/<record>.json.gz
    results/answers/questions/<split>-<seed>.csv.gz

Records are not committed, and a page of numbers alone cannot be checked. So whoever makes a page
also writes, for each record that the page shows or names, the parsed answers (a letter per
question) and the parts of the record that pages print. Everything else follows: the questions'
classes and right answers give the accuracies, the intervals and the tests. `read_answers` returns
records, and a page is made of them with the same functions as of the records that a run wrote
(`qvlm.tables.verify`).

The questions are those that the generator gives. Their classes and right answers are kept once per
split, because generating the 20,000 of "claims" again takes most of a minute. A test compares them
with the generator's, and each cell's file has a hash of those that it answered.

Problems of other sources cannot be generated, so cells that answered those are not written. The
texts of answers and the details of a method's report are left out, as are paths and commands, which
belong to the machine.

A cell on the plain text of the package has no answers. Its file holds the sums over each document
of what was measured per token, and the perplexity and the rest follow from these.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from qvlm.data import miniature
from qvlm.data.prompts import LETTERS, guess
from qvlm.data.sizes import MINIATURE_SIZES
from qvlm.data.text import NAME as TEXTS
from qvlm.errors import RunError, UserError
from qvlm.evaluation.metrics import class_metrics
from qvlm.evaluation.text_metrics import summarize
from qvlm.records.cells import SUFFIX
from qvlm.records.files import explained, write_file, write_folder
from qvlm.records.record import Record, plain

FACTS = "facts.json"  # what a page shows that no record holds, such as measured times
QUESTIONS = "questions"  # the folder of what was asked, beside those of the pages
UNPARSABLE = "-"  # letter of an answer that names no choice

_QUESTION = ("question_id", "subject", "grade", "skill", "has_image", "has_text", "n_choices")
_TYPES = {"has_image": bool, "has_text": bool, "n_choices": int, "answer": int}
_COMPARED = (*_QUESTION, "answer", "prediction", "correct")
# Parts that say where a cell ran and not what it computed.
_OF_THE_MACHINE = {
    "config": (
        "committed",
        "device",
        "force",
        "launcher",
        "max_memory",
        "preflight",
        "results_dir",
    ),
    "run": ("command", "files", "slurm_job", "slurm_restarts", "started"),
}
_PATHS = ("path", "packed", "vision_tower")  # of the model; embedded models have a name there


def folder_of(results: Path, page: str) -> Path:
    """Returns the folder of a page's answers.

    Args:
        results: Folder of the page.
        page: Name of the page, such as "table2".
    """
    return results / "answers" / page


@lru_cache(maxsize=4)
def questions(split: str, seed: int) -> pd.DataFrame:
    """Generates what pages need of a split of the miniature data.

    Args:
        split: Name of the split.
        seed: Seed of the generator.

    Returns:
        A row per question, as `predictions.parquet` has it: `question_id`, `subject`, `grade`,
        `skill`, `has_image`, `has_text`, `n_choices` and `answer`.
    """
    problems = miniature.generate(split, MINIATURE_SIZES[split], seed)
    return pd.DataFrame(
        {
            "question_id": f"{split}-{index}",
            "subject": problem["subject"],
            "grade": problem["grade"],
            "skill": problem["skill"],
            "has_image": problem["image"] is not None,
            "has_text": bool(problem["hint"].strip()),
            "n_choices": len(problem["choices"]),
            "answer": problem["answer"],
        }
        for index, problem in enumerate(problems)
    )


@lru_cache(maxsize=4)
def read_questions(file: Path) -> pd.DataFrame:
    """Returns the questions of a split as `write_answers` kept them; see `questions`.

    Args:
        file: File of the split, or where one would be.

    Raises:
        RunError: If the file is damaged.
    """
    try:
        kept = pd.read_csv(file, keep_default_na=False)
        kept.insert(0, "question_id", [f"{file.name.partition('-')[0]}-{i}" for i in kept.index])
        return kept[[*_QUESTION, "answer"]].astype(_TYPES)
    except (OSError, EOFError, zlib.error, ValueError, KeyError) as error:
        raise RunError(f"{file} is not what a page wrote ({error}); make the page anew") from error


def questions_file(folder: Path, split: str, seed: int) -> Path:
    """Returns where the questions of a split are kept, for a page's folder of answers."""
    return folder.parent / QUESTIONS / f"{split}-{seed}.csv.gz"


def obstacle(record: Record) -> str | None:
    """Returns why the answers of a record cannot be committed, or None if they can.

    Args:
        record: Record of any cell.
    """
    data = record.config["data"]
    if record.kind == "text":
        return None if data.get("source") == TEXTS else "its texts are not those of the package"
    if data.get("source") != "miniature":
        return "its problems are not generated"
    asked = questions(data["split"], data["seed"])
    if len(record.predictions) > len(asked):
        return "it has more answers than its split has problems"
    letters, cut = _letters(record.predictions)
    rebuilt = _predictions(asked, record.config, record.metrics, letters, cut)
    for column in _COMPARED:
        if _values(rebuilt[column]) != _values(record.predictions[column]):
            return f"its column {column} does not follow from its problems and answers"
    return None


def write_answers(
    folder: Path, records: Sequence[Record], facts: Mapping[str, Any] | None = None
) -> None:
    """Writes the answers behind a page, and what was asked, and replaces those of an older page.

    Args:
        folder: Folder of the page's answers.
        records: Records that the page shows or names, without an `obstacle`.
        facts: What else the page shows, as JSON can hold it, or None.

    Raises:
        UserError: If the folder cannot be written. Then the one before is unchanged.
    """

    def fill(place: Path) -> None:
        for record in records:
            text = json.dumps(_compact(record), separators=(",", ":"), allow_nan=False)
            # Without a time, so that the same record gives the same bytes.
            (place / f"{record.name}{SUFFIX}").write_bytes(gzip.compress(text.encode(), mtime=0))
        if facts is not None:
            text = json.dumps(plain(facts), indent=1, allow_nan=False)
            (place / FACTS).write_text(text + "\n", encoding="utf-8")

    asked = {
        (record.config["data"]["split"], record.config["data"]["seed"])
        for record in records
        if record.kind != "text"
    }
    with explained(f"--out: {folder}", UserError, "choose a folder that can be written"):
        write_folder(folder, fill)
        for split, seed in sorted(asked):
            text = questions(split, seed).drop(columns="question_id").to_csv(index=False)
            file = questions_file(folder, split, seed)
            write_file(file, gzip.compress(text.encode(), mtime=0))
    read_questions.cache_clear()


def read_answers(folder: Path) -> list[Record]:
    """Returns the records of a page's answers, sorted by name.

    Their predictions are rebuilt from the questions and have no texts, and the classes in their
    metrics are computed from these predictions, as the measures of plain text are from the sums
    over its documents. Questions that are not kept are generated.

    Raises:
        RunError: If a file is damaged, or the questions are not those that were answered.
    """
    return [read_one(path) for path in sorted(folder.glob(f"*{SUFFIX}"))]


def read_one(path: Path) -> Record:
    """Reads the answers of one cell.

    Raises:
        RunError: If the file is damaged, or the questions are not those that were answered.
    """
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
        config, run, metrics = (dict(content[part]) for part in ("config", "run", "metrics"))
        columns = content["layers"]
        layers = [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
        if on_text := "documents" in content:
            predictions = pd.DataFrame(content["documents"])
            metrics.setdefault("text", summarize(predictions))
            same = True
        else:
            split, seed = config["data"]["split"], config["data"]["seed"]
            kept = questions_file(path.parent, split, seed)
            asked = read_questions(kept) if kept.is_file() else questions(split, seed)
            predictions = _predictions(asked, config, metrics, content["answers"], content["cut"])
            same = content["questions"] == _checksum(predictions)
    except (
        OSError,
        EOFError,
        zlib.error,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise RunError(f"{path} is not what a page wrote ({error}); make the page anew") from error
    if not same:
        raise RunError(
            f"{path}: the questions are not those that were answered; make the page anew"
        )
    if not on_text:
        metrics.setdefault("classes", class_metrics(predictions))
    place = path.with_name(path.name.removesuffix(SUFFIX))
    return Record(place, config, run, metrics, predictions, layers)


def read_facts(folder: Path) -> dict[str, Any]:
    """Returns what a page shows that no record holds.

    Raises:
        RunError: If the file is missing or damaged.
    """
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError) as error:
        raise RunError(f"{folder / FACTS} is not what a page wrote; make the page anew") from error
    return facts


def letters_of(record: Record) -> str:
    """Returns the parsed answers of a record, a letter per question and `UNPARSABLE` for none."""
    return _letters(record.predictions)[0]


def _compact(record: Record) -> dict[str, Any]:
    """Returns the content of a record's file."""
    parts = {"config": plain(record.config), "run": plain(record.run)}
    for name, part in parts.items():
        for key in _OF_THE_MACHINE[name]:
            part.pop(key, None)
    model = parts["config"]["model"]
    for key in _PATHS:
        if Path(model.get(key) or "").is_absolute():
            del model[key]
    for key in ("save_packed", "tracking"):
        parts["config"].pop(key, None)
    parts["run"]["report"].pop("details", None)
    metrics = plain(record.metrics)
    names = list(record.layers[0]) if record.layers else []
    layers = {name: [plain(row.get(name)) for row in record.layers] for name in names}
    # Classes and measures are computed again by whoever reads the file. Only a record that every
    # table refuses, since they do not follow from its answers, keeps its own.
    if record.kind == "text":
        if metrics["text"] == plain(summarize(record.predictions)):
            del metrics["text"]
        sums = {name: plain(record.predictions[name].tolist()) for name in record.predictions}
        return {**parts, "metrics": metrics, "layers": layers, "documents": sums}
    if metrics["classes"] == plain(class_metrics(record.predictions)):
        del metrics["classes"]
    letters, cut = _letters(record.predictions)
    return {
        **parts,
        "metrics": metrics,
        "layers": layers,
        "questions": _checksum(record.predictions),
        "answers": letters,
        "cut": cut,
    }


def _letters(predictions: pd.DataFrame) -> tuple[str, list[int]]:
    """Returns the answers as letters, and the positions of those that were cut."""
    found = [
        UNPARSABLE if pd.isna(choice) else LETTERS[choice] for choice in predictions["prediction"]
    ]
    cut = predictions["cut"].tolist() if "cut" in predictions else []
    return "".join(found), [index for index, value in enumerate(cut) if value]


def _predictions(
    asked: pd.DataFrame,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    letters: str,
    cut: Sequence[int],
) -> pd.DataFrame:
    """Rebuilds the predictions of a cell from the questions of its split and its answers."""
    asked = asked.iloc[: len(letters)].copy()
    chosen = [None if letter == UNPARSABLE else LETTERS.index(letter) for letter in letters]
    scored = chosen
    if metrics.get("unparsable_rule") == "random":
        drawn = zip(chosen, asked["question_id"], asked["n_choices"], strict=True)
        scored = [
            guess(question, choices, config["seed"]) if choice is None else choice
            for choice, question, choices in drawn
        ]
    positions = set(cut)
    return asked.assign(
        prediction=pd.array(chosen, dtype="Int64"),
        correct=[a == b for a, b in zip(scored, asked["answer"], strict=True)],
        cut=[index in positions for index in range(len(asked))],
    )


def _checksum(predictions: pd.DataFrame) -> str:
    """Returns a hash of the questions and their right answers, 64 hexadecimal digits."""
    columns = [_values(predictions[column]) for column in (*_QUESTION, "answer")]
    return hashlib.sha256(json.dumps(columns).encode()).hexdigest()


def _values(column: pd.Series) -> list[Any]:
    """Returns a column as plain values, with None where one is missing."""
    missing = column.isna()
    return [None if gone else value for value, gone in zip(column.tolist(), missing, strict=True)]

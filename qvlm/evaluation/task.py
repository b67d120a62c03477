"""The functions that `scienceqa.yaml` names: what a question is, and what an answer is worth.

Everything that a function needs stands in the row it is given: `documents` writes the prompt, the
prompt format and the fallback choice next to the data set's own columns. So there is no module
state, and the same task serves any model and any data set with ScienceQA's columns.

Images stay encoded in the documents: lm-eval lists all of them at once and reads the split twice,
which for the real test split would be some 2,000 decoded pictures, two times. The adapter decodes
each when its batch is due.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from qvlm.data.prompts import Prompting

COLUMNS = ("image", "question", "choices", "answer", "hint", "grade", "subject", "skill")


def documents(
    dataset: datasets.Dataset, prompting: Prompting, unparsable: str, seed: int, **_: Any
) -> dict[str, datasets.Dataset]:
    """Prepares a split for lm-eval.

    Args:
        dataset: rows with at least `COLUMNS`.
        prompting: of the model to be evaluated.
        unparsable: "wrong", or "random" for the official script's fallback.
        seed: of that fallback.

    Returns:
        `{"test": rows}` with four more columns: `question_id`, `prompt`, `format`, and `guess`,
        the choice that counts if the answer is unparsable (None: none, so it is wrong).
    """
    rows = dataset.select_columns(list(COLUMNS)).cast_column("image", datasets.Image(decode=False))
    if "question_id" in dataset.column_names:
        ids = list(dataset["question_id"])
    else:  # a data set that was made in Python
        prefix = f"{dataset.split}-" if dataset.split is not None else ""
        ids = [f"{prefix}{index}" for index in range(len(rows))]
    prompts, guesses = [], []
    for question_id, row in zip(ids, rows, strict=True):
        prompts.append(prompting.prompt(row))
        guesses.append(
            guess(question_id, len(row["choices"]), seed) if unparsable == "random" else None
        )
    added = {
        "question_id": (ids, "string"),
        "prompt": (prompts, "string"),
        "format": ([prompting.format] * len(rows), "string"),
        "guess": (guesses, "int64"),
    }
    for name, (values, kind) in added.items():
        rows = rows.add_column(name, values, feature=datasets.Value(kind))
    return {"test": rows}


def guess(question_id: str, n_choices: int, seed: int) -> int:
    """The random choice for an unparsable answer.

    It depends on the question and the seed alone, not on which other answers were unparsable, so
    that two methods that both fail on a question are given the same luck.
    """
    return random.Random(f"{seed}/{question_id}").randrange(n_choices)


def visual(doc: Mapping[str, Any]) -> list[Any]:
    """The encoded image of a document as a list, empty if it has none."""
    return [] if doc["image"] is None else [doc["image"]]


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Judges one generated text; the values of lm-eval's metrics for this question.

    `prediction` is what the text says, None if it says nothing, also where a guess is scored: the
    share of unparsable answers can be read from the predictions under either rule.
    """
    text = results[0]
    prediction = Prompting(format=doc["format"]).parse(text, len(doc["choices"]))
    scored = doc["guess"] if prediction is None else prediction
    correct = scored == doc["answer"]
    return {
        "acc": float(correct),
        "unparsable": float(prediction is None),
        "predictions": {
            "question_id": doc["question_id"],
            "subject": doc["subject"],
            "grade": doc["grade"],
            "skill": doc["skill"],
            "has_image": doc["image"] is not None,
            "has_text": bool(doc["hint"].strip()),
            "n_choices": len(doc["choices"]),
            "answer": doc["answer"],
            "prediction": prediction,
            "correct": correct,
            "text": text,
        },
    }


def keep(values: list[Any]) -> list[Any]:
    """The aggregation that aggregates nothing."""
    return values

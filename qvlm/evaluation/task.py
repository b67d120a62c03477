"""The functions of ScienceQA's YAML files: they make prompts from problems and score answers.

Each function finds all that it needs in the row it is given, because `documents` adds the prompt,
the prompt format and the fallback choice to the data set's own columns. The module has no state,
and the same task serves any model and any data set with ScienceQA's columns.

Images stay encoded in the documents. lm-eval lists all documents at once and reads the split twice,
which would keep some 2,000 decoded images of the real test split in memory. The adapter decodes
an image when its batch runs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from qvlm.data.prompts import LETTERS, Prompting, guess

_TEXT = datasets.Value("string")
COLUMNS = ("image", "question", "choices", "answer", "hint", "grade", "subject", "skill")


def documents(
    dataset: datasets.Dataset, prompting: Prompting, unparsable: str, seed: int, **_: Any
) -> dict[str, datasets.Dataset]:
    """Prepares a split for lm-eval.

    Args:
        dataset: Rows with at least `COLUMNS`.
        prompting: Prompt format and conversation of the model.
        unparsable: "wrong", or "random" for the official script's fallback.
        seed: Seed of that fallback.

    Returns:
        `{"test": rows}` with six more columns: `question_id`, `official_id` (None where the source
        has none), `prompt`, `answers`, which name a choice each, `format`, and `guess`, which is
        the choice that is scored if the answer is unparsable (None scores it as wrong).
    """
    rows = dataset.select_columns(list(COLUMNS)).cast_column("image", datasets.Image(decode=False))
    if "question_id" in dataset.column_names:
        ids = list(dataset["question_id"])
    else:  # a data set that was made in Python
        prefix = f"{dataset.split}-" if dataset.split is not None else ""
        ids = [f"{prefix}{index}" for index in range(len(rows))]
    official = [None] * len(rows)
    if "official_id" in dataset.column_names:
        official = list(dataset["official_id"])
    prompts, answers, guesses = [], [], []
    for question_id, row in zip(ids, rows, strict=True):
        prompts.append(prompting.prompt(row))
        answers.append(prompting.answers(row))
        guesses.append(
            guess(question_id, len(row["choices"]), seed) if unparsable == "random" else None
        )
    added = {
        "question_id": (ids, _TEXT),
        "official_id": (official, _TEXT),
        "prompt": (prompts, _TEXT),
        "answers": (answers, datasets.List(_TEXT)),
        "format": ([prompting.format] * len(rows), _TEXT),
        "guess": (guesses, datasets.Value("int64")),
    }
    for name, (values, feature) in added.items():
        rows = rows.add_column(name, values, feature=feature)
    return {"test": rows}


def visual(doc: Mapping[str, Any]) -> list[Any]:
    """Returns the encoded image of a document in a list, which is empty if it has no image."""
    return [] if doc["image"] is None else [doc["image"]]


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Scores one generated text and returns its row of predictions as lm-eval's only metric.

    `prediction` is the choice that the text names, or None if it names none, also where a random
    choice is scored. The share of unparsable answers can thus be read under either rule.
    """
    text = results[0]
    prediction = Prompting(format=doc["format"]).parse(text, len(doc["choices"]))
    scored = doc["guess"] if prediction is None else prediction
    return {
        "predictions": {
            "question_id": doc["question_id"],
            "official_id": doc["official_id"],
            "subject": doc["subject"],
            "grade": doc["grade"],
            "skill": doc["skill"],
            "has_image": doc["image"] is not None,
            "has_text": bool(doc["hint"].strip()),
            "n_choices": len(doc["choices"]),
            "answer": doc["answer"],
            "prediction": prediction,
            "correct": scored == doc["answer"],
            "text": text,
        },
    }


def rank(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Scores the likelihoods of a problem's answers as `score` does the letter of the likeliest.

    Args:
        doc: Problem.
        results: Log-probability of each answer in nats, and whether it would be generated.
    """
    likelihoods = [likelihood for likelihood, _ in results]
    return score(doc, [LETTERS[likelihoods.index(max(likelihoods))]])


def keep(values: list[Any]) -> list[Any]:
    """Returns the rows as they are, instead of aggregating them."""
    return values

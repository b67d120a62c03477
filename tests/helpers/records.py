"""Records of runs that never ran."""

import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
from PIL import Image

from qvlm.data import miniature
from qvlm.data.scienceqa import COLUMNS
from qvlm.data.sizes import MINIATURE_SIZES
from qvlm.evaluation.metrics import class_metrics
from qvlm.evaluation.text_metrics import summarize
from qvlm.records.record import (
    Record,
    write_record,
)

LAYERS = [f"vision.layers.{i}.fc1" for i in range(2)] + [
    f"language.layers.{i}.up" for i in range(3)
]


SUBJECTS = ("natural science", "social science", "language science")


STANDS_FOR = {
    "mini_llava": "llava_13b",
    "mini_moe_llava": "moe_llava",
    "llava_v15_7b": "llava_v15_7b",
}


def make_predictions(accuracy: float, n: int = 300, seed: int = 0) -> pd.DataFrame:
    """`n` questions; the same whatever the accuracy, which decides only who is right."""
    asked, answers = random.Random(0), random.Random(seed)
    rows = []
    for index in range(n):
        row: dict[str, Any] = {
            "question_id": f"test-{index}",
            "subject": asked.choices(SUBJECTS, (53, 21, 26))[0],
            "grade": f"grade{asked.randint(1, 12)}",
            "skill": f"skill {asked.randint(0, 5)}",
            "has_image": asked.random() < 0.48,
            "has_text": asked.random() < 0.48,
            "n_choices": 3,
            "answer": asked.randrange(3),
        }
        right = answers.random() * 100 < accuracy
        wrong = None if answers.random() < 0.1 else (row["answer"] + 1) % 3
        row["prediction"] = row["answer"] if right else wrong
        row["correct"] = right
        row["text"] = "The answer is B."
        rows.append(row)
    return pd.DataFrame(rows).astype({"prediction": "Int64"})


@lru_cache(maxsize=1)
def generated_problems() -> list[dict[str, Any]]:
    """The test split of the miniature."""
    return miniature.generate("test", MINIATURE_SIZES["test"], 0)


def make_answers(accuracy: float, n: int = 300, seed: int = 0) -> pd.DataFrame:
    """The same as `make_predictions`, for the first `n` problems that are generated."""
    rows: list[dict[str, Any]] = make_predictions(accuracy, n, seed).to_dict("records")
    for row, problem in zip(rows, generated_problems(), strict=False):
        missing = pd.isna(row["prediction"])
        row |= {key: problem[key] for key in ("subject", "grade", "skill", "answer")}
        row["has_image"] = problem["image"] is not None
        row["has_text"] = problem["hint"].strip() != ""
        row["n_choices"] = len(problem["choices"])
        shifted = (row["answer"] + (not row["correct"])) % row["n_choices"]
        row |= {"prediction": None if missing else shifted, "cut": missing}
    return pd.DataFrame(rows).astype({"prediction": "Int64"})


def make_layers(bits: str) -> list[dict[str, Any]]:
    """A proof that holds."""
    if bits == "FP":
        return []
    w, a = int(bits[1]), int(bits[3])
    return [
        dict(
            layer=name,
            w_bits=w,
            a_bits=a,
            weight_levels=2**w,
            input_levels=2**a - 1,
            probed=False,
        )
        for name in LAYERS
    ]


def keep(classes: dict[str, Any]) -> None:
    """Changes nothing."""


def make_record(
    runs: Path,
    method: str = "RTN",
    bits: str = "W4A4",
    model: str = "mini_llava",
    accuracy: float = 70.0,
    n: int = 300,
    seed: int = 0,
    layers: Sequence[dict[str, Any]] | None = None,
    metrics: Callable[[dict[str, Any]], None] = keep,
    finished: str = "2026-01-01T00:00:00+00:00",
    name: str = "",
    parameters: dict[str, Any] | None = None,
    weights: str = "w",
    documents: pd.DataFrame | None = None,
    tasks: dict[str, float] | None = None,
    generated: bool = False,
    group: str = "table2",
    **setting: Any,
) -> Record:
    """Writes the record of a cell and reads it back.

    Args:
        metrics: changes the classes before they are written.
        documents: sums of documents, which make it a record on plain text.
        tasks: accuracy by task, which makes it a record on tasks of lm-eval.
        generated: whether the problems are those of the miniature, so that answers can be kept.
        group: name of the sweep.
        setting: replaces parts of what the cell depends on: data, evaluation, seed, ...
    """
    predictions = (make_answers if generated else make_predictions)(accuracy, n, seed)
    classes = class_metrics(predictions)
    metrics(classes)
    if bits == "FP":
        method = "FP"
    config: dict[str, Any] = {
        "model": {"name": model, "path": model, "stands_for": STANDS_FOR.get(model)},
        "method": {"_target_": f"methods.{method}", **(parameters or {})},
        "bits": {"weights": None, "activations": None}
        if bits == "FP"
        else {"weights": int(bits[1]), "activations": int(bits[3])},
        "data": {"name": "miniature", "split": "test", "seed": 0},
        "evaluation": {"limit": None},
        "seed": 0,
    }
    if generated or documents is not None:
        config["data"]["source"] = "miniature" if generated else "text"
    if bits != "FP":
        config["quantizer"] = {"weight": {"granularity": "per_group", "group_size": 64}, "p": 0.5}
        config["calibration"] = {"split": "train", "samples": 3}
    config |= setting
    tracking = dict(mode="off", project="qvlm", entity=None, dir=str(runs / "wandb"), examples=8)
    stages = ["load", "evaluate"] if bits == "FP" else ["load", "quantize", "evaluate"]
    run = {
        "hash": "0",
        "influences": config,
        "code": "c",
        "files_hashed": {"model": weights},
        "model": model,
        "method": method,
        "method_name": method.lower(),
        "seed": 0,
        "device": "cpu",
        "threads": 2,
        "command": "python run.py",
        "stages": {stage: {"seconds": 1.5, "peak_mib": 700.0} for stage in stages},
        "calibration": {"split": "train", "ids": [] if bits == "FP" else [1, 5, 8]},
        "uncalibrated": [],
        "report": {"search_seconds": 2.0, "candidates": 7, "details": {}},
        "exceeding": [],
        "finished": finished,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "git": {"revision": "0123456789abcdef", "dirty": False},
        "hardware": dict(system="Linux", cpu="Some CPU", cores=2, memory_gib=16.0, gpu=None),
    }
    path = runs / (name or f"{model}-{method.lower()}-{bits.lower()}-00000000")
    whole = {**config, "tracking": tracking, "group": group}
    written: dict[str, Any] = {"classes": classes, "unparsable_rule": "wrong"}
    if documents is not None:
        written, predictions = {"text": summarize(documents)}, documents
    if tasks is not None:
        whole["tasks"] = {"names": list(tasks)}
        written, predictions = make_scores(tasks)
    proof = make_layers(bits) if layers is None else list(layers)
    return write_record(path, whole, run, written, predictions, proof)


def make_scores(tasks: dict[str, float]) -> tuple[dict[str, Any], pd.DataFrame]:
    """Metrics and samples of tasks with two questions each, by their accuracy."""
    columns = ("filter", "requests", "responses", "target", "metrics")
    samples = [
        {"task": task, "doc_id": row, **dict.fromkeys(columns, "none")}
        for task in tasks
        for row in range(2)
    ]
    results = {
        task: {"alias": task, "accuracy,none": accuracy, "accuracy_stderr,none": 0.125}
        for task, accuracy in tasks.items()
    }
    counts = {task: {"original": 9, "effective": 2} for task in tasks}
    return {"tasks": {"results": results, "n-samples": counts}}, pd.DataFrame(samples)


def make_questions(record: Record) -> datasets.Dataset:
    """The questions of a record; each image has a color of its own."""
    rows = [
        {
            **dict.fromkeys(COLUMNS, "x"),
            "image": Image.new("RGB", (8, 8), (row, 0, 0)) if pictured else None,
            "question": f"Question {row}?",
            "choices": ["red", "green", "blue"],
            "answer": answer,
            "hint": "Look." if row % 2 else "",
        }
        for row, (pictured, answer) in enumerate(
            zip(record.predictions["has_image"], record.predictions["answer"], strict=True)
        )
    ]
    return datasets.Dataset.from_list(rows, features=COLUMNS)


FILES = ["config.yaml", "metrics.json", "predictions.parquet", "bits.json", "run.json"]


PREDICTIONS = pd.DataFrame(
    {
        "question_id": [0, 1],
        "has_image": [True, False],
        "answer": [1, 2],
        "prediction": pd.array([1, None], dtype="Int64"),
        "correct": [True, False],
        "text": ["B", "é"],
    }
)


RUN: dict[str, Any] = {
    "hash": "abc",
    "model": "mini",
    "method": "RTN",
    "method_name": "rtn",
    "finished": "2026-01-01T00:00:00+00:00",
    "report": {"search_seconds": None, "candidates": None},
    "exceeding": [],
    "influences": {"bits": {"weights": 4, "activations": 4}},
    **{key: {} for key in ("stages", "versions", "git", "hardware")},
}


def write(path: Path, accuracy: float = 50.0) -> Record:
    return write_record(
        path,
        config={"seed": 0, "results_dir": Path("results")},
        run=RUN,
        metrics={"classes": {"Avg": {"n": np.int64(2), "accuracy": accuracy}}},
        predictions=PREDICTIONS,
        layers=[{"layer": "a", "w_bits": 4, "a_bits": 4, "weight_levels": 16, "input_levels": 9}],
    )

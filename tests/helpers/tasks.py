"""Tasks of lm-eval in a folder: YAML files, and their data as JSON lines and parquet."""

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from PIL import Image

ANSWERS = ("a b c", "d", "e f")
QUESTIONS = ("g h", "i j k l m", "n", "o g h i j k l m n o", "h")

MEAN = {"aggregation": "mean", "higher_is_better": True}
TEXT_TASKS: dict[str, dict[str, Any]] = {
    "toy_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "options",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
    },
    "toy_generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{options[answer]}}",
        "generation_kwargs": {"until": ["C"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
    "toy_likelihood": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{options[answer]}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity"}],
    },
    "toy_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}
PICTURE_TASKS: dict[str, dict[str, Any]] = {
    "toy_pictures": {
        "output_type": "generate_until",
        "doc_to_text": "USER: <image> g <image> {{question}}",
        "doc_to_image": ["first", "second"],
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
    "toy_picture_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",  # names no image, so that they come first
        "doc_to_image": ["first", "second"],
        "doc_to_choice": ["a", "b c"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", **MEAN}],
    },
}


def write_tasks(folder: Path) -> Path:
    """Writes four tasks of text and two with two pictures to each question, and a group of two."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"question": question, "options": ANSWERS, "answer": row % len(ANSWERS)})
        for row, question in enumerate(QUESTIONS)
    ]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    rows = [
        {"question": question, "answer": "A", "first": _png(40 * row), "second": _png(255 - row)}
        for row, question in enumerate(QUESTIONS)
    ]
    _with_pictures(rows).to_parquet(folder / "pictures.parquet")
    for tasks, kind, file in (
        (TEXT_TASKS, "json", "questions.jsonl"),
        (PICTURE_TASKS, "parquet", "pictures.parquet"),
    ):
        for name, task in tasks.items():
            data = {"dataset_path": kind, "dataset_kwargs": {"data_files": str(folder / file)}}
            content = {"task": name, **data, "validation_split": "train", **task}
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


def _png(shade: int) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (12, 9), (shade, 90, 255 - shade)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def _with_pictures(rows: list[dict[str, Any]]) -> Any:
    """The rows with columns that `datasets` reads as images."""
    import datasets

    dataset = datasets.Dataset.from_pandas(pd.DataFrame(rows))
    for column in ("first", "second"):
        dataset = dataset.cast_column(column, datasets.Image())
    return dataset

"""What a W&B run shows: numbers, tables, charts, examples with images, and the record itself."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from PIL.Image import Image

from qvlm.data.prompts import LETTERS
from qvlm.records.record import Record

if TYPE_CHECKING:
    import datasets


def log_record(
    run: Any, record: Record, problems: "datasets.Dataset | None", examples: int
) -> None:
    """Logs a record: tables, charts, summary, and its folder as an artifact.

    The table `examples` shows the same few problems for every cell, so that methods can be compared
    answer by answer.

    Args:
        run: Open W&B run.
        record: Complete record on disk.
        problems: Problems that were asked, in the order of the record's predictions; None for text
            and tasks.
        examples: Number of problems to show.
    """
    import wandb

    seconds = {name: cost["seconds"] for name, cost in record.run["stages"].items()}
    if record.kind != "problems":
        shown = {"samples" if record.kind == "tasks" else "documents": table(record.predictions)}
    else:
        classes = pd.DataFrame.from_dict(record.metrics["classes"], orient="index")
        classes = classes.rename_axis("class").reset_index()
        shown = {"classes": table(classes)}
        asked = classes[classes["n"] > 0]
        shown["accuracy_by_class"] = bars(asked, "class", "accuracy", "Accuracy by class, %")
    stages = pd.DataFrame({"stage": list(seconds), "seconds": list(seconds.values())})
    shown["seconds_by_stage"] = bars(stages, "stage", "seconds", "Seconds by stage")
    if problems is not None and examples:
        shown["examples"] = _examples(record, problems, examples)
    run.log(shown)
    run.summary.update(summary(record))
    artifact = wandb.Artifact(re.sub(r"[^\w.-]", "_", record.name), type="record")
    artifact.add_dir(str(record.path))
    run.log_artifact(artifact)


def comparison(records: Sequence[Record]) -> dict[str, Any]:
    """Returns the charts that compare records: accuracy of each, and memory against accuracy."""
    import wandb

    if not records:
        return {}
    rows = []
    for record in records:
        average = record.metrics["classes"]["Avg"]
        label = f"{record.model} {record.method} {record.bits}"
        weights = record.run.get("weight_bytes")
        rows.append(
            {
                "cell": label,
                **{key: average[key] for key in ("accuracy", "ci_low", "ci_high")},
                "weights_mib": weights / 2**20 if weights else None,
                "execution": record.run.get("execution", "simulated"),
            }
        )
    frame = pd.DataFrame(rows)
    charts = {"accuracy_by_cell": bars(frame, "cell", "accuracy", "Accuracy by cell, %")}
    if frame["weights_mib"].notna().any():
        known = table(frame[frame["weights_mib"].notna()])
        title = "Accuracy against memory: weights as they were executed, MiB"
        chart = wandb.plot.scatter(known, "weights_mib", "accuracy", title=title)
        charts["accuracy_against_memory"] = chart
    return charts


def bars(frame: pd.DataFrame, label: str, value: str, title: str) -> Any:
    """Returns a bar chart of W&B.

    Args:
        frame: Rows of the chart.
        label, value: Columns with the names and the lengths of the bars.
        title: Title of the chart.
    """
    import wandb

    return wandb.plot.bar(table(frame), label, value, title=title)


def summary(record: Record) -> dict[str, float]:
    """Returns the numbers of a record by flat names: `accuracy/NAT`, `seconds/evaluate`, ..."""
    numbers: dict[str, float | None] = {}
    for name, row in record.metrics.get("classes", {}).items():
        numbers |= {f"{key}/{name}": row[key] for key in row}
    for task, metrics in record.metrics.get("tasks", {}).get("results", {}).items():
        numbers |= {f"{task}/{key}": v for key, v in metrics.items() if isinstance(v, int | float)}
    for name in ("perplexity", "kl", "agreement") if record.kind == "text" else ():
        measure = record.metrics["text"][name]
        numbers[name] = measure and measure["value"]
    for stage, costs in record.run["stages"].items():
        numbers |= {f"{key}/{stage}": cost for key, cost in costs.items()}
    if weights := record.run.get("weight_bytes"):
        numbers["weights/mib"] = weights / 2**20
    numbers["search/seconds"] = record.run["report"]["search_seconds"]
    numbers["search/candidates"] = record.run["report"]["candidates"]
    if record.layers:
        layers = pd.DataFrame(record.layers)
        numbers["bits/layers"] = len(layers)
        numbers["bits/most_weight_levels"] = int(layers["weight_levels"].max())
        numbers["bits/most_input_levels"] = int(layers["input_levels"].max())
        numbers["bits/exceeding"] = len(record.run["exceeding"])
    return {key: value for key, value in numbers.items() if value is not None}


def example_rows(has_image: list[bool], count: int) -> list[int]:
    """Chooses evenly spaced rows, half of them with an image where there are enough of both kinds.

    Args:
        has_image: For each row, whether it has an image.
        count: Number of rows to choose, at most.
    """
    with_image = [row for row, image in enumerate(has_image) if image]
    without = [row for row, image in enumerate(has_image) if not image]
    half = max(count - len(without), min(count // 2, len(with_image)))
    return sorted(_spaced(with_image, half) + _spaced(without, count - half))


def _spaced(rows: list[int], count: int) -> list[int]:
    count = min(count, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def _examples(record: Record, problems: "datasets.Dataset", count: int) -> Any:
    import wandb

    columns = ["question_id", "skill", "image", "question", "choices", "answer", "prediction"]
    table = wandb.Table(columns=[*columns, "correct", "text"])
    for row in example_rows(record.predictions["has_image"].tolist(), count):
        problem, answer = problems[row], record.predictions.iloc[row]
        choices = [f"({LETTERS[i]}) {choice}" for i, choice in enumerate(problem["choices"])]
        table.add_data(
            str(answer["question_id"]),
            problem["skill"],
            _image(problem["image"]),
            "\n".join(part for part in (problem["hint"], problem["question"]) if part),
            " ".join(choices),
            LETTERS[problem["answer"]],
            None if pd.isna(answer["prediction"]) else LETTERS[answer["prediction"]],
            bool(answer["correct"]),
            answer["text"],
        )
    return table


def _image(image: Image | None) -> Any:
    """Returns a W&B image; None if there is none, or if it cannot be shown in RGB."""
    import wandb

    if image is None:
        return None
    try:
        return wandb.Image(image.convert("RGB"))
    except (OSError, ValueError):
        return None


def table(frame: pd.DataFrame) -> Any:
    """Returns a W&B table in which missing values are None instead of NaN."""
    import wandb

    rows = frame.astype(object).where(frame.notna(), None).to_numpy().tolist()
    return wandb.Table(columns=[str(column) for column in frame.columns], data=rows)

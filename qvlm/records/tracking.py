"""Weights & Biases: one run per cell, and one run per table with the table as its artifact.

Tracking starts when a record or a table is complete, so it cannot cost a result: whatever goes
wrong is one warning. `tracking=offline` is the default. It needs no account and makes no network
call; `wandb sync` uploads the folders later. `tracking=online` becomes offline if there is no API
key or no connection.

W&B is imported only where it is used, so never with `tracking=off`. It collects nothing by itself
(no console, no system metrics, no code, no host name): hardware, revision and timings come from the
record. Its working files go below `tracking.dir` instead of the home folder, unless the environment
variables of W&B say otherwise.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
from PIL.Image import Image
from tqdm import tqdm

from qvlm.config.schema import TrackingConfig
from qvlm.data.prompts import LETTERS
from qvlm.records.record import Record

CONNECT_SECONDS = 30
UPLOAD_SECONDS = 120


def track(
    record: Record, problems: datasets.Dataset | None, tracking: TrackingConfig, group: str
) -> None:
    """Logs one cell as a W&B run.

    The run has the name of the record, tags for model, method and bits, the configuration, and the
    accuracy per class as summary and as the table `classes`. Timings, memory and the measured bits
    are in the summary. The table `examples` shows the same few problems for every cell, so that
    methods can be compared answer by answer.

    Args:
        record: Complete record on disk.
        problems: Problems that were asked, in the order of the record's predictions; None for text.
        tracking: Mode, project and folder, and the number of examples.
        group: Name of the group of cells that the run belongs to.
    """
    if tracking.mode == "off":
        return

    def log(run: Any) -> None:
        if record.on_text:
            tables = {"documents": _table(record.predictions)}
        else:
            classes = pd.DataFrame.from_dict(record.metrics["classes"], orient="index")
            tables = {"classes": _table(classes.rename_axis("class").reset_index())}
        if problems is not None and tracking.examples:
            tables["examples"] = _examples(record, problems, tracking.examples)
        run.log(tables)
        run.summary.update(summary(record))

    kept = (
        "hash",
        "git",
        "versions",
        "hardware",
        "device",
        "processes",
        "threads",
        "command",
        "finished",
    )
    _log(
        log,
        tracking,
        name=record.name,
        group=group,
        job_type="cell",
        tags=[record.model, record.method, record.bits],
        config={**record.config, "run": {key: record.run.get(key) for key in kept}},
    )


def log_table(csv: Path, page: Path, tracking: TrackingConfig, group: str) -> None:
    """Logs a finished table: both of its files as an artifact, and the CSV as a W&B table.

    Args:
        csv: Table in long form; the stem of its name is the name of the table.
        page: Table as a page.
        tracking: Mode, project and folder.
        group: Name of the group of cells that the table shows.
    """
    if tracking.mode == "off":
        return

    def log(run: Any) -> None:
        import wandb

        run.log({csv.stem: _table(pd.read_csv(csv))})
        artifact = wandb.Artifact(csv.stem, type="table")
        for path in (csv, page):
            artifact.add_file(str(path), name=path.name)
        run.log_artifact(artifact)

    _log(
        log,
        tracking,
        name=f"{group}-{csv.stem}",
        group=group,
        job_type="table",
        tags=["table"],
        config={},
    )


def summary(record: Record) -> dict[str, float]:
    """Returns the numbers of a record by flat names: `accuracy/NAT`, `seconds/evaluate`, ..."""
    numbers: dict[str, float | None] = {}
    for name, row in record.metrics.get("classes", {}).items():
        numbers |= {f"{key}/{name}": row[key] for key in row}
    for name in ("perplexity", "kl", "agreement") if record.on_text else ():
        measure = record.metrics["text"][name]
        numbers[name] = measure and measure["value"]
    for stage, costs in record.run["stages"].items():
        numbers |= {f"{key}/{stage}": cost for key, cost in costs.items()}
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


def _examples(record: Record, problems: datasets.Dataset, count: int) -> Any:
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


def _table(frame: pd.DataFrame) -> Any:
    """Returns a W&B table in which missing values are None instead of NaN."""
    import wandb

    rows = frame.astype(object).where(frame.notna(), None).to_numpy().tolist()
    return wandb.Table(columns=[str(column) for column in frame.columns], data=rows)


def _log(log: Callable[[Any], None], tracking: TrackingConfig, **about: Any) -> None:
    """Opens a run, lets `log` fill it and closes it. Any failure becomes a warning."""
    import wandb

    try:
        with _environment(tracking):
            mode: Any = tracking.mode
            # Without a mode W&B posts telemetry; unless it is silent it asks for an API key.
            wandb.setup(wandb.Settings(silent=True, mode=mode))
            run = _open(tracking, about)
            try:
                log(run)
            finally:
                run.finish()
                wandb.teardown()  # ends W&B's service process, which otherwise outlives its runs
    except Exception as error:  # the exceptions of W&B have no common base class
        _warn(f"Weights & Biases did not log {about['name']} ({_reason(error)})")


def _open(tracking: TrackingConfig, about: Mapping[str, Any]) -> Any:
    import wandb

    settings = wandb.Settings(
        silent=True,
        console="off",
        host="",
        init_timeout=CONNECT_SECONDS,
        finish_timeout=UPLOAD_SECONDS,
        save_code=False,
        disable_git=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
    # W&B adds a folder named wandb to the one that it is given.
    folder = Path(tracking.dir)
    parent = folder.parent if folder.name == "wandb" else folder
    mode: Any = tracking.mode
    try:
        return wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            dir=parent,
            mode=mode,
            reinit="create_new",
            settings=settings,
            **about,
        )
    except Exception as error:
        if tracking.mode == "offline":
            raise
        _warn(
            f"tracking=online is not possible ({_reason(error)}); {about['name']} is kept offline. "
            f"Upload it later with: wandb sync {parent / 'wandb'}/offline-run-*"
        )
        return _open(replace(tracking, mode="offline"), about)


@contextmanager
def _environment(tracking: TrackingConfig) -> Iterator[None]:
    """Sets the environment variables of W&B that the user has not set, for as long as a run lasts.

    They keep W&B's staging and cache folders in `tracking.dir` and, offline, switch off the crash
    reports of its service process.
    """
    folder = Path(tracking.dir)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {"WANDB_DATA_DIR": folder / "data", "WANDB_CACHE_DIR": folder / "cache"}
    values = {name: str(path.absolute()) for name, path in wanted.items()}
    if tracking.mode == "offline":
        values["WANDB_ERROR_REPORTING"] = "false"
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def _warn(sentence: str) -> None:
    tqdm.write(f"warning: {sentence}", file=sys.stderr)

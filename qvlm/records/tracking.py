"""Weights & Biases: every cell a run, every table a run that holds it as an artifact.

Called when a record or a table is complete, so nothing that happens here can cost a result: what
goes wrong is one warning. Offline is the default and needs neither account nor network; later,
`wandb sync` uploads the folders. Online without a key or connection becomes offline.

W&B is imported where it is used: with `mode: "off"` never. It watches nothing by itself here (no
console, no system metrics, no code, no host name): hardware, revision and timings come from the
record. Its working files go below `tracking.dir` instead of the home folder, unless W&B's own
environment variables say otherwise.
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
from tqdm import tqdm

from qvlm.config.schema import TrackingConfig
from qvlm.data.prompts import LETTERS
from qvlm.records.record import Record

CONNECT_SECONDS = 30
UPLOAD_SECONDS = 120


def track(
    record: Record, questions: datasets.Dataset, tracking: TrackingConfig, group: str
) -> None:
    """Logs one cell.

    The run has the record's name, the tags model, method and bits, the configuration, accuracy per
    class as summary and as the table `classes`, stage timings and memory, what the proof of bits
    saw, and the table `examples`: the same few questions for every cell, so that methods can be
    compared answer by answer.

    Args:
        record: complete and on disk.
        questions: what was asked, in the order of the record's predictions.
        tracking: where to, and how many examples.
        group: cells that belong together.
    """

    if tracking.mode == "off":
        return

    def log(run: Any) -> None:
        classes = pd.DataFrame.from_dict(record.metrics["classes"], orient="index")
        tables = {"classes": _table(classes.rename_axis("class").reset_index())}
        if tracking.examples:
            tables["examples"] = _examples(record, questions, tracking.examples)
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
    """Logs a finished table: the artifact of both files, and the long form as a W&B table.

    Args:
        csv, page: the table in its two forms; the name of `csv` is that of the table.
        tracking: where to.
        group: the cells that it shows.
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
    """The numbers of a record under flat names: `accuracy/NAT`, `seconds/evaluate`, ..."""
    numbers: dict[str, float | None] = {}
    for name, row in record.metrics["classes"].items():
        numbers |= {f"{key}/{name}": row[key] for key in row}
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
    """Evenly spaced rows, half of them with an image as far as there are enough of either."""
    pictured = [row for row, image in enumerate(has_image) if image]
    plain = [row for row, image in enumerate(has_image) if not image]
    half = max(count - len(plain), min(count // 2, len(pictured)))
    return sorted(_spaced(pictured, half) + _spaced(plain, count - half))


def _spaced(rows: list[int], count: int) -> list[int]:
    count = min(count, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def _examples(record: Record, questions: datasets.Dataset, count: int) -> Any:
    import wandb

    columns = ["question_id", "skill", "image", "question", "choices", "answer", "prediction"]
    table = wandb.Table(columns=[*columns, "correct", "text"])
    for row in example_rows(record.predictions["has_image"].tolist(), count):
        asked, said = questions[row], record.predictions.iloc[row]
        choices = [f"({LETTERS[i]}) {choice}" for i, choice in enumerate(asked["choices"])]
        table.add_data(
            str(said["question_id"]),
            asked["skill"],
            wandb.Image(asked["image"]) if asked["image"] is not None else None,
            "\n".join(part for part in (asked["hint"], asked["question"]) if part),
            " ".join(choices),
            LETTERS[asked["answer"]],
            None if pd.isna(said["prediction"]) else LETTERS[said["prediction"]],
            bool(said["correct"]),
            said["text"],
        )
    return table


def _table(frame: pd.DataFrame) -> Any:
    """A W&B table; missing values are None, which NaN would not be."""
    import wandb

    rows = frame.astype(object).where(frame.notna(), None).to_numpy().tolist()
    return wandb.Table(columns=[str(column) for column in frame.columns], data=rows)


def _log(log: Callable[[Any], None], tracking: TrackingConfig, **about: Any) -> None:
    """Opens a run, lets `log` fill it and closes it; warns where that cannot be done."""
    import wandb

    try:
        with _below(Path(tracking.dir)):
            wandb.setup(wandb.Settings(silent=True))  # nor does it ask for a key then
            run = _open(tracking, about)
            try:
                log(run)
            finally:
                run.finish()
                wandb.teardown()  # ends W&B's service, which outlives its runs otherwise
    except Exception as error:  # what W&B raises has no base class in common
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
    folder = Path(tracking.dir)
    mode: Any = tracking.mode
    try:
        return wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            # W&B adds a folder of this name to the one it is given.
            dir=folder.parent if folder.name == "wandb" else folder,
            mode=mode,
            reinit="create_new",
            settings=settings,
            **about,
        )
    except Exception as error:
        if tracking.mode == "offline":
            raise
        _warn(
            f"tracking=online is not possible ({_reason(error)}); {about['name']} is kept offline, "
            f"upload it later with: wandb sync {folder}/offline-run-*"
        )
        return _open(replace(tracking, mode="offline"), about)


@contextmanager
def _below(folder: Path) -> Iterator[None]:
    """Keeps W&B's staging and cache folders in `folder` for the time being."""
    folder.mkdir(parents=True, exist_ok=True)
    places = {"WANDB_DATA_DIR": "data", "WANDB_CACHE_DIR": "cache"}
    set_here = [name for name in places if name not in os.environ]
    for name in set_here:
        os.environ[name] = str(folder.absolute() / places[name])
    try:
        yield
    finally:
        for name in set_here:
            del os.environ[name]


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def _warn(sentence: str) -> None:
    tqdm.write(f"warning: {sentence}", file=sys.stderr)

"""Memory and speed of packed models: Table 4's measurements, or else the packed records.

Table 4 times models side by side and weighs each in a fresh process, so its file is preferred. The
records of packed execution hold the bytes of their weights and the seconds of their evaluation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from qvlm.report.content import Content
from qvlm.tables.labels import FP

TABLE4 = "table4.csv"
_NEEDED = {"model", "bits", "method", "weight_gib", "seconds_per_question", "accuracy"}


@dataclass(frozen=True)
class Cost:
    """What a model takes, and how well it answers.

    Attributes:
        model, bits, method: The cell.
        mib: MiB of the weights.
        speed: Questions per second.
        accuracy: Accuracy in percent.
        runs: Numbers of the records that it comes from.
    """

    model: str
    bits: str
    method: str
    mib: float
    speed: float
    accuracy: float
    runs: tuple[int, ...] = ()


def read_table4(folder: Path) -> pd.DataFrame | None:
    """Returns Table 4's CSV beside the records, or None if there is none of this form."""
    path = folder / TABLE4
    if not path.is_file():
        return None
    frame = pd.read_csv(path)
    return frame if {*frame} >= _NEEDED else None


def costs(content: Content, table4: pd.DataFrame | None) -> list[Cost]:
    """Returns the cost of each packed model, and of full precision for comparison.

    Args:
        content: Records of the report.
        table4: Rows of Table 4, or None.
    """
    if table4 is not None:
        rows = table4.to_dict("records")
        return [
            Cost(
                *(str(row["model"]), str(row["bits"]), str(row["method"])),
                mib=1024 * float(row["weight_gib"]),
                speed=1 / float(row["seconds_per_question"]),
                accuracy=float(row["accuracy"]),
            )
            for row in rows
            if pd.notna(row["accuracy"])
        ]
    packed = content.packed.shown
    models = {record.model for record in packed}
    full = [r for r in content.whole.shown if r.method == FP and r.model in models]
    found = []
    for record in [*full, *packed]:
        stage = record.run["stages"].get("evaluate", {})
        asked = len(record.predictions) - stage.get("resumed_questions", 0)
        if not (stage.get("seconds") and record.run.get("weight_bytes") and asked):
            continue
        found.append(
            Cost(
                *(record.model, record.bits, record.method),
                mib=record.run["weight_bytes"] / 2**20,
                speed=asked / stage["seconds"],
                accuracy=record.metrics["classes"]["Avg"]["accuracy"],
                runs=(content.numbers[record.name],),
            )
        )
    return found


def by_model(found: Sequence[Cost]) -> dict[str, list[Cost]]:
    """Returns the costs of each model."""
    models = dict.fromkeys(cost.model for cost in found)
    return {model: [cost for cost in found if cost.model == model] for model in models}

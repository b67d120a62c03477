"""The paper's numbers as data, and two checks of its Table 2 that anyone can repeat.

The numbers are in `paper/*.csv` as printed, including their inconsistencies. `paper/README.md` says
where they come from. A table shows them only in rows that name the paper's model.
"""

from pathlib import Path
from typing import Any

import pandas as pd

from qvlm.data.sizes import PUBLISHED_CLASSES
from qvlm.data.sizes import SUBJECTS as SCIENCEQA_SUBJECTS
from qvlm.errors import UserError
from qvlm.records.record import Record

FOLDER = Path(__file__).resolve().parent / "paper"

SUBJECTS = tuple(SCIENCEQA_SUBJECTS.values())
_ROW = ["model", "bits", "method"]


def published(name: str) -> pd.DataFrame:
    """Returns one file of the folder: "table1" to "table6", "models" or "variants"."""
    return pd.read_csv(FOLDER / f"{name}.csv")


def rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Returns the rows of a file as dictionaries."""
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def label(model: str) -> str:
    """Returns the paper's name of one of its models, such as "LLaVA-13B".

    Raises:
        UserError: If the paper has no such model.
    """
    labels = published("models").set_index("model")["label"]
    if model not in labels.index:
        raise UserError(
            f"model.stands_for={model} is not a model of the paper. "
            f"Choose one of: null, {', '.join(labels.index)}."
        )
    return str(labels[model])


def paper_model(record: Record) -> str | None:
    """Returns the model of the paper that a record's model stands for, or None."""
    return record.config["model"].get("stands_for")


def table2_values(model: str) -> dict[tuple[str, str], dict[str, float]]:
    """Returns Table 2 of one of the paper's models.

    Returns:
        Accuracy in percent by class, by (bits, method).
    """
    own = published("table2").query("model == @model").drop(columns="model")
    return {(row.pop("bits"), row.pop("method")): row for row in rows(own)}


def average_gaps(table: pd.DataFrame, tolerance: float = 0.05) -> pd.DataFrame:
    """Finds rows whose Avg is not the mean of their subjects, weighted by numbers of questions.

    Args:
        table: Rows of `published("table2")`.
        tolerance: Gap that rounding may explain, in points.

    Returns:
        One row per gap, with the columns `model`, `bits`, `method`, `printed`, `computed`, and
        `gap`, which is printed - computed.
    """
    questions = pd.Series({name: PUBLISHED_CLASSES[name] for name in SUBJECTS})
    computed = (table[list(SUBJECTS)] * questions).sum(axis=1) / questions.sum()
    gaps = table[_ROW].assign(printed=table["Avg"], computed=computed, gap=table["Avg"] - computed)
    return gaps[gaps["gap"].abs() > tolerance].reset_index(drop=True)


def fractional_questions(table: pd.DataFrame) -> pd.DataFrame:
    """Finds accuracies of a class that no whole number of correct answers gives, to two decimals.

    Args:
        table: Rows of `published("table2")`.

    Returns:
        One row per such accuracy, with the columns `model`, `bits`, `method`, `class` and
        `accuracy`, for the classes of `PUBLISHED_CLASSES`.
    """
    cells = table.melt(_ROW, list(PUBLISHED_CLASSES), var_name="class", value_name="accuracy")
    n = cells["class"].map(PUBLISHED_CLASSES)
    right = (cells["accuracy"] * n / 100).round()
    whole = (100 * right / n - cells["accuracy"]).abs() < 0.005 + 1e-9
    return cells[~whole].reset_index(drop=True)

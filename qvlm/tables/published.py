"""The paper's numbers, as data, and two checks of Table 2 that anyone can repeat.

They stand in `paper/*.csv` as printed, inconsistencies included; `paper/README.md` says where they
come from. What a table shows of them is always on a row that names the paper's model.
"""

from pathlib import Path
from typing import Any

import pandas as pd

from qvlm.data.scienceqa import PUBLISHED_CLASSES
from qvlm.data.scienceqa import SUBJECTS as SCIENCEQA_SUBJECTS
from qvlm.errors import UserError

FOLDER = Path(__file__).resolve().parent / "paper"

CLASS_SIZES = PUBLISHED_CLASSES
SUBJECTS = tuple(SCIENCEQA_SUBJECTS.values())
ROW = ["model", "bits", "method"]


def published(name: str) -> pd.DataFrame:
    """One file of the folder: "table1" to "table6", "models" or "variants"."""
    return pd.read_csv(FOLDER / f"{name}.csv")


def rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a file as dictionaries."""
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def label(model: str) -> str:
    """How the paper calls one of its models: "LLaVA-13B".

    Raises:
        UserError: if it has no such model.
    """
    labels = published("models").set_index("model")["label"]
    if model not in labels.index:
        raise UserError(
            f"model.stands_for: {model!r} is no model of the paper; accepted are null, "
            f"{', '.join(labels.index)}"
        )
    return str(labels[model])


def table2_values(model: str) -> dict[tuple[str, str], dict[str, float]]:
    """Table 2 of one of the paper's models: (bits, method) -> class -> accuracy in percent."""
    own = published("table2").query("model == @model").drop(columns="model")
    return {(row.pop("bits"), row.pop("method")): row for row in rows(own)}


def average_gaps(table: pd.DataFrame, tolerance: float = 0.05) -> pd.DataFrame:
    """Rows whose Avg is not the mean of their subjects, weighted by the number of questions.

    Args:
        table: rows of `published("table2")`.
        tolerance: the gap that rounding may explain, in points.

    Returns:
        `model`, `bits`, `method`, `printed`, `computed` and `gap` = printed - computed.
    """
    questions = pd.Series({name: CLASS_SIZES[name] for name in SUBJECTS})
    computed = (table[list(SUBJECTS)] * questions).sum(axis=1) / questions.sum()
    gaps = table[ROW].assign(printed=table["Avg"], computed=computed, gap=table["Avg"] - computed)
    return gaps[gaps["gap"].abs() > tolerance].reset_index(drop=True)


def fractional_questions(table: pd.DataFrame) -> pd.DataFrame:
    """Class accuracies that no whole number of right answers gives, to two decimals.

    Returns:
        `model`, `bits`, `method`, `class` and `accuracy`, for the classes of `CLASS_SIZES`.
    """
    cells = table.melt(ROW, list(CLASS_SIZES), var_name="class", value_name="accuracy")
    n = cells["class"].map(CLASS_SIZES)
    right = (cells["accuracy"] * n / 100).round()
    whole = (100 * right / n - cells["accuracy"]).abs() < 0.005 + 1e-9
    return cells[~whole].reset_index(drop=True)

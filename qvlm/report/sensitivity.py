"""Where the loss comes from, part by part: a chart per model that `qvlm sensitivity` measured."""

from dataclasses import dataclass

import pandas as pd
from markupsafe import Markup

from qvlm.report import charts
from qvlm.report.charts import Point
from qvlm.tables.sensitivity.page import by_model, estimate, find, parts_of
from qvlm.tables.sensitivity.parts import ALONE, DEPTH, EVERYTHING, OTHERS, PART

AXIS = "KL from full precision, nats per token"
# What is quantized, and the measure that is shown of it -> mark and name in the legend.
SERIES = {
    (ALONE, "kl"): (1, "quantized alone"),
    (OTHERS, "saved"): (2, "saved if left in floating point"),
}


@dataclass(frozen=True)
class Sensitivity:
    """The parts of one model.

    Attributes:
        title: Model, method and bit widths.
        whole: KL of the whole model quantized, with its interval.
        chart: Each part's KL alone, and how much of the whole model's it saves to leave it out.
    """

    title: str
    whole: str
    chart: Markup


def sensitivities(rows: pd.DataFrame | None) -> list[Sensitivity]:
    """Returns what the page shows of each model.

    Args:
        rows: Rows of `sensitivity.csv`, or None if it was not measured.
    """
    models = [] if rows is None else by_model(rows)
    return [
        Sensitivity(title, estimate(find(own, EVERYTHING, ALONE), "kl", 4), _chart(title, own))
        for title, own in models
    ]


def _chart(title: str, own: pd.DataFrame) -> Markup:
    parts = parts_of(own, PART, DEPTH)
    points = []
    for band, part in enumerate(parts):
        for place, ((quantized, name), (mark, label)) in enumerate(SERIES.items()):
            row = find(own, part, quantized)
            about = f"{part}, {label}: {estimate(row, name, 4)} nats per token"
            y, known = band + (place + 1) / (len(SERIES) + 1), pd.notna(row[f"{name}_low"])
            ends = (row[f"{name}_low"], row[f"{name}_high"]) if known else (None, None)
            points.append(Point(row[name], y, about, mark, (), *ends))
    reached = [end for p in points for end in (p.x, p.low, p.high) if end is not None]
    x, height = charts.linear_axis(reached, AXIS), 34 * len(parts)
    name = f"Loss by part, {title}"
    return charts.chart(name, x, charts.bands(parts), points, (), height, sideways=True)

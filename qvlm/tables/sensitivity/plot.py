"""The plot: a panel per model with a row per part, as wide as a column of a page."""

import io

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from qvlm.tables.figure import STYLE
from qvlm.tables.sensitivity.page import by_model, find, parts_of
from qvlm.tables.sensitivity.parts import ALONE, DEPTH, EVERYTHING, OTHERS, PART

WIDTH, ROW, MARGIN = 3.4, 0.15, 0.75  # inches: of the figure, of a part, around a panel
STATES = {"quantized alone": (ALONE, "kl"), "saved if left in floating point": (OTHERS, "saved")}


def plot(rows: pd.DataFrame) -> bytes:
    """Draws the KL of every part, alone and saved, with the whole model's as a line; a PNG.

    Args:
        rows: Rows with the columns of `rows.COLUMNS`.
    """
    models = [(title, own, parts_of(own, PART, DEPTH)) for title, own in by_model(rows)]
    heights = [ROW * len(parts) + MARGIN for _, _, parts in models]
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(
            len(models),
            figsize=(WIDTH, sum(heights) + 0.3),
            height_ratios=heights,
            squeeze=False,
        )
        for axis, (title, own, parts) in zip(axes[:, 0], models, strict=True):
            _panel(axis, own, parts)
            axis.set_title(title)
        axes[-1, 0].set_xlabel("KL from full precision, nats per token")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=1, frameon=False)
        content = io.BytesIO()
        figure.savefig(content, format="png", metadata={"Software": None})
        plt.close(figure)
    return content.getvalue()


def _panel(axis: Axes, own: pd.DataFrame, parts: list[str]) -> None:
    """Draws one model; its parts run from top to bottom."""
    for index, (label, (quantized, name)) in enumerate(STATES.items()):
        found = pd.DataFrame([find(own, part, quantized) for part in parts])
        values = found[name]
        ends = [values - found[f"{name}_low"], found[f"{name}_high"] - values]
        ends = [end.clip(lower=0) for end in ends]  # a KL of zero may round to below zero
        places = [row + 0.3 * (index - 0.5) for row in range(len(parts))]
        mark = "os"[index]
        axis.errorbar(values, places, xerr=ends, label=label, linestyle="none", marker=mark)
    whole = find(own, EVERYTHING, ALONE)["kl"]
    axis.axvline(whole, color="0.3", linestyle="--", linewidth=0.8, label="everything quantized")
    axis.axhline(len(parts_of(own, PART)) - 0.5, color="0.7", linewidth=0.8)
    axis.ticklabel_format(axis="x", style="plain")  # a factor of ten would stand in the label
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.set_yticks(range(len(parts)), parts)
    axis.set_ylim(len(parts) - 0.4, -0.6)

"""Draws the picture of the README: a question with three answers, and the accuracy of each method.

    python experiments/overview_figure.py --runs results/runs --out docs/images/overview.png

The question is the first of the test split on directions on a map that full precision and Q-VLM
answer rightly and rounding to nearest wrongly, on mini_llava at W4A4; if there is one, the first
for which full precision gives the right reason, too. Its answers come from records. The chart is
drawn from results/table2.csv, and has the methods that were measured on all models. Nothing is run.
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes

from qvlm.command import folder, run_command
from qvlm.data.prompts import LETTERS
from qvlm.data.scienceqa import load_scienceqa
from qvlm.errors import UserError
from qvlm.records.record import Record, find_records
from qvlm.tables.labels import BASELINE, FP, QVLM, method_order

ROOT = Path(__file__).resolve().parents[1]
MODEL, BITS, SKILL = "mini_llava", "W4A4", "Read a map: cardinal directions"
ASKED = {FP: "full precision", BASELINE: f"{BITS}, {BASELINE}", QVLM: f"{BITS}, {QVLM}"}
# Okabe and Ito's palette, which readers with any color vision tell apart.
RIGHT, WRONG, MODELS = "#009E73", "#D55E00", {"mini_llava": "#0072B2", "mini_moe_llava": "#E69F00"}
LINE = 50  # letters of a line beside the image
# Left, bottom, width and height of image, text and chart, as shares of the figure.
PLACES = ((0.01, 0.1, 0.24, 0.8), (0.265, 0.0, 0.32, 0.97), (0.72, 0.17, 0.27, 0.7))


def answers_of(records: Sequence[Record]) -> dict[str, pd.DataFrame]:
    """Returns the answers of the three cells, by method, each indexed by question.

    Raises:
        UserError: If one of them is not recorded.
    """
    found = {
        record.method: record.predictions.set_index("question_id")
        for record in sorted(records, key=lambda record: record.run["finished"])
        if record.model == MODEL and record.bits in (FP, BITS) and record.method in ASKED
    }
    if missing := [method for method in ASKED if method not in found]:
        raise UserError(
            f"--runs has no record of {MODEL} with {missing[0]}. Run "
            f"`qvlm -m model={MODEL} method=fp,rtn,qvlm bits=w4a4` first."
        )
    return found


def choose(answers: dict[str, pd.DataFrame]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the problem of the picture, and what each method answered.

    Raises:
        UserError: If no question fits.
    """
    wanted = {FP: True, BASELINE: False, QVLM: True}
    fitting = []
    for row, problem in enumerate(load_scienceqa("miniature", "test")):
        given = {
            method: frame.loc[f"test-{row}"]
            for method, frame in answers.items()
            if f"test-{row}" in frame.index
        }
        fits = all(m in given and bool(given[m]["correct"]) is wanted[m] for m in wanted)
        if fits and problem["skill"] == SKILL:
            fitting.append((problem, given))
    if not fitting:
        raise UserError("--runs has no question on directions that only RTN answers wrongly.")
    reasoned = [(each, given) for each, given in fitting if _right(each) in given[FP]["text"]]
    return (reasoned or fitting)[0]


def _right(problem: dict[str, Any]) -> str:
    return str(problem["choices"][problem["answer"]])


def draw_question(image: Axes, text: Axes, problem: dict[str, Any], given: dict[str, Any]) -> None:
    """Draws the image of the problem and, beside it, its text and the answers."""
    image.imshow(problem["image"], interpolation="nearest")
    image.set_xticks([])
    image.set_yticks([])
    text.axis("off")
    choices = [f"({LETTERS[i]}) {choice}" for i, choice in enumerate(problem["choices"])]
    lines = [(problem["question"], "black", "bold"), ("   ".join(choices), "black", "normal")]
    for method, title in ASKED.items():
        answer = given[method]
        lines.append((title, "#555555", "normal"))
        mark, color = ("✓", RIGHT) if answer["correct"] else ("✗", WRONG)
        lines.append((f"{mark} {answer['text']}", color, "normal"))
    height = 1.0
    for line, color, weight in lines:
        wrapped = textwrap.fill(line, LINE)
        text.text(0, height, wrapped, color=color, weight=weight, va="top", fontsize=9.5)
        height -= 0.072 * (wrapped.count("\n") + 1) + (0.0 if color == "#555555" else 0.03)


def draw_chart(axes: Axes, table: pd.DataFrame) -> None:
    """Draws the accuracy of each method at W4A4 with its interval, and full precision as a line."""
    whole = table[table["class"] == "Avg"]
    shown = whole[whole["bits"] == BITS]
    measured = [set(shown[shown["model"] == model]["method"]) for model in MODELS]
    methods = sorted(set.intersection(*measured), key=method_order, reverse=True)
    for shift, (model, color) in zip((0.12, -0.12), MODELS.items(), strict=True):
        rows = shown[shown["model"] == model].set_index("method").reindex(methods)
        places = [index + shift for index in range(len(methods))]
        errors = [rows["accuracy"] - rows["ci_low"], rows["ci_high"] - rows["accuracy"]]
        axes.errorbar(rows["accuracy"], places, xerr=errors, fmt="o", color=color, label=model)
        full = whole[(whole["model"] == model) & (whole["bits"] == FP)]["accuracy"]
        for value in full:
            axes.axvline(value, color=color, linestyle=":")
    axes.set_yticks(range(len(methods)), methods)
    axes.set_xlabel("accuracy at W4A4, % (dotted: full precision)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(description="Draws the picture of the README.")
    parser.add_argument("--runs", type=folder, default=ROOT / "results" / "runs")
    parser.add_argument("--table", type=folder, default=ROOT / "results" / "table2.csv")
    parser.add_argument("--out", type=folder, default=ROOT / "docs" / "images" / "overview.png")
    return run_command(parser, work, arguments)


def work(options: argparse.Namespace) -> None:
    """Draws and writes the picture."""
    problem, given = choose(answers_of(find_records(options.runs)))
    figure = pyplot.figure(figsize=(12, 3.8))
    image, text, chart = (figure.add_axes(place) for place in PLACES)
    draw_question(image, text, problem, given)
    draw_chart(chart, pd.read_csv(options.table, keep_default_na=False))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=110)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    sys.exit(main())

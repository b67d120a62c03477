"""`python -m qvlm audit` writes `audit.md`: what does not add up in the paper's printed numbers.

Everything on the page follows from data of this package: the printed tables (`paper/*.csv`), the
sizes of ScienceQA's classes, and the published answers of the checkpoint. Each finding is shown
with its computation. A difference is a reason to check a number again. It does not say where the
number comes from, and the page does not guess.
"""

import sys
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from qvlm.command import run_command
from qvlm.data.sizes import PUBLISHED_CLASSES, PUBLISHED_QUESTIONS
from qvlm.evaluation.metrics import class_metrics, wilson
from qvlm.markdown import bullets, table
from qvlm.tables.command import made_with, table_parser, write_files
from qvlm.tables.published import SUBJECTS, average_gaps, label, published, rows
from qvlm.tables.published_answers import CHECKPOINTS, published_predictions
from qvlm.tables.report import signed

CHECKPOINT = "llava_v13_13b"
CLASSES = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "Avg")  # columns of Table 2
# What the paper's text says: memory and time of LLaVA-13B in full precision over those at W4A4.
CLAIMED = {"memory_gib": 2.78, "time_hours": 1.44}
_SETTING = ["model", "bits", "method"]

HEAD = """\
# An audit of the paper's numbers

The numbers that "Q-VLM: Post-training Quantization for Large Vision-Language Models" (NeurIPS 2024,
arXiv 2410.08119) prints are checked against each other, against the sizes of ScienceQA's classes,
and against the published answers of LLaVA-v1.3-13B, the checkpoint of its LLaVA-13B rows. Each
finding has its computation, so that anyone can repeat it. A difference is a reason to check a
number again. It does not say where the number comes from. Rounding to two decimals explains 0.01
points, and nothing on this page is that small unless it says so."""


def class_sizes() -> dict[str, int]:
    """Returns the number of questions of each class of Table 2.

    The published test split has the subjects' sizes; TXT, IMG and NO are counted in the published
    answers.
    """
    counted = class_metrics(published_predictions(CHECKPOINT))
    sizes = {name: counted[name]["n"] for name in ("TXT", "IMG", "NO", "Avg")}
    return {name: {**PUBLISHED_CLASSES, **sizes}[name] for name in CLASSES}


def page(made_with: str) -> str:
    """Returns the page.

    Args:
        made_with: Command that the page names.
    """
    parts = [HEAD]
    for title, section in (
        ("Averages beside their own classes", _averages()),
        ("Full precision beside published answers", _full_precision()),
        ("Accuracies that no number of right answers gives", _fractions()),
        ("Ratios in the text beside their table", _ratios()),
        ("One setting in several tables", _repeated()),
        ("What the differences can show", _noise()),
        ("Two copies of the paper", _copies()),
    ):
        parts += [f"## {title}", *section]
    parts += ["## How this was made", bullets([f"Command: `{made_with}`"])]
    return "\n\n".join(parts) + "\n"


def _setting(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["model"], row["bits"], row["method"]


def _name(row: dict[str, Any]) -> list[str]:
    return [label(row["model"]), row["bits"], row["method"]]


def _averages() -> list[str]:
    sizes = class_sizes()
    printed = {_setting(row): row for row in rows(published("table2"))}
    all_gaps = average_gaps(published("table2"), tolerance=-1)["gap"].abs()
    rest = all_gaps[all_gaps <= 0.05].max()
    lines = []
    for row in rows(average_gaps(published("table2"))):
        own = printed[_setting(row)]
        terms = " + ".join(f"{sizes[name]} x {own[name]:.2f}" for name in SUBJECTS)
        computed, gap = f"{row['computed']:.2f}", signed(row["gap"])
        questions = signed(row["gap"] * PUBLISHED_QUESTIONS / 100, 0)
        lines.append([*_name(row), terms, f"{row['printed']:.2f}", computed, gap, questions])
    header = ["model", "bits", "method", f"(...) / {PUBLISHED_QUESTIONS}", "printed Avg"]
    return [
        "NAT, SOC and LAN divide the questions, so Avg is their mean weighted by their sizes. "
        f"These {len(lines)} of {len(printed)} rows of Table 2 are off by more than 0.05 points. "
        f"The others are off by at most {rest:.3f}.",
        table([*header, "computed Avg", "gap", "in questions"], lines, left=3),
    ]


def _full_precision() -> list[str]:
    sizes = class_sizes()
    counted = class_metrics(published_predictions(CHECKPOINT))
    (row,) = rows(published("table2").query("model == 'llava_13b' and method == 'FP'"))
    lines = []
    for name in ("TXT", "IMG", "NO", "Avg"):
        right = round(counted[name]["accuracy"] * sizes[name] / 100)
        printed = round(row[name] * sizes[name] / 100)
        lines.append(
            [
                *(name, str(sizes[name]), f"{row[name]:.2f}", str(printed)),
                *(f"{counted[name]['accuracy']:.2f}", str(right), signed(printed - right, 0)),
            ]
        )
    low, high = wilson(right, sizes["Avg"])
    header = ["class", "questions", "printed", "right", "published answers", "right", "difference"]
    return [
        f"The LLaVA repository publishes the answers of {CHECKPOINTS[CHECKPOINT]}, tuned on "
        "ScienceQA, to all questions of the test split. The paper's full-precision row of "
        f"LLaVA-13B has {right - printed} right answers fewer.",
        table(header, lines),
        f"The 95 % Wilson interval around the published accuracy is {100 * low:.2f} to "
        f"{100 * high:.2f}. The published answers were sampled at temperature 0.2. Another sample, "
        "another prompt or another numerical type gives other answers. All drops in the paper's "
        "table count from the printed row.",
    ]


def _whole(accuracy: float, size: int) -> bool:
    """Whether some whole number of right answers gives an accuracy, to two decimals."""
    return abs(100 * round(accuracy * size / 100) / size - accuracy) < 0.005 + 1e-9


def _fractions() -> list[str]:
    sizes = class_sizes()
    lines = []
    for row in rows(published("table2")):
        off = [name for name in CLASSES if not _whole(row[name], sizes[name])]
        if off:
            lines.append([*_name(row), str(len(off)), ", ".join(off)])
    name, size = "SOC", sizes["SOC"]
    value = float(
        published("table2").query("model == 'llava_13b'").set_index(_SETTING)[name].iloc[1]
    )
    below = int(value * size / 100)
    ends = " and ".join(f"{n} / {size} is {100 * n / size:.2f} %" for n in (below, below + 1))
    clean = len(published("table2")) - len(lines)
    return [
        "An accuracy over n questions is a whole number of right answers divided by n. For "
        f"example, {ends}, and nothing lies between. One row of LLaVA-13B prints {value:.2f} for "
        f"{name}. {clean} rows pass for every column, and these {len(lines)} do not. A mean over "
        "several runs need not pass.",
        table(["model", "bits", "method", "columns", "which"], lines, left=3),
    ]


def _ratios() -> list[str]:
    own = {_setting(row): row for row in rows(published("table4"))}
    full, four = own["llava_13b", "FP", "FP"], own["llava_13b", "W4A4", "Q-VLM"]
    lines = []
    for column, claimed in CLAIMED.items():
        ratio = full[column] / four[column]
        name, unit = {"memory_gib": ("memory", "G"), "time_hours": ("time", "h")}[column]
        needed = f"{claimed * four[column]:.1f} {unit}"
        terms = f"{full[column]:g} / {four[column]:g}"
        lines.append([name, f"{claimed:.2f}x", terms, f"{ratio:.2f}x", needed])
    header = ["", "text", "Table 4, FP / Q-VLM W4A4", "ratio", "FP that the text needs"]
    return [
        "The abstract says how much less memory and time LLaVA-13B takes at W4A4.",
        table(header, lines),
        "The ratio of time is within rounding of the table. The ratio of memory is not.",
    ]


def _repeated() -> list[str]:
    """Compares the values of one setting that several tables print."""
    settings: dict[tuple[str, ...], dict[str, float]] = {}
    for name, place, value, *setting in _printed():
        settings.setdefault((place, *setting), {})[name] = value
    shared = {key: found for key, found in settings.items() if len(found) > 1}
    lines = []
    for (what, model, bits, method), found in shared.items():
        for (first, a), (second, b) in combinations(found.items(), 2):
            if abs(a - b) > 1e-9:
                values = [f"{a:g} in {first}", f"{b:g} in {second}", signed(b - a)]
                lines.append([label(model), bits, method, what, *values])
    words = f"{len(shared)} values stand in more than one table. {len(shared) - len(lines)} agree"
    if not lines:
        return [f"{words}."]
    header = ["model", "bits", "method", "value", "", "", "difference"]
    return [f"{words}, and these do not:", table(header, lines, left=4)]


def _printed() -> list[tuple[Any, ...]]:
    """Returns (table, kind of value, value, model, bits, method) of all that is printed."""
    found: list[tuple[Any, ...]] = []
    for row in rows(published("table2")):
        found.append(("Table 2", "accuracy", row["Avg"], *(row[key] for key in _SETTING)))
    for row in rows(published("table1")):
        setting = tuple(row[key] for key in _SETTING)
        found.append(("Table 1", "accuracy", row["accuracy"], *setting))
        found.append(("Table 1", "search hours", row["search_cost_hours"], *setting))
    for row in rows(published("table4")):
        setting = tuple(row[key] for key in _SETTING)
        found.append(("Table 4", "accuracy", row["accuracy"], *setting))
        found.append(("Table 4", "hours", row["time_hours"], *setting))
    for row in rows(published("table5")):
        if row["proxy"] != "entropy":
            continue
        for bits in ("W6A6", "W4A4"):  # entropy as the proxy is CDM added to QLoRA
            setting = row["model"], bits, "QLoRA+CDM"
            found.append(("Table 5", "accuracy", row[f"{bits}_accuracy"], *setting))
            found.append(("Table 5", "search hours", row[f"{bits}_search_hours"], *setting))
    for row in rows(published("table6")):
        for bits in ("W8A8", "W4A4"):
            setting = row["model"], bits, row["method"]
            found.append(("Table 6", "accuracy", row[f"{bits}_accuracy"], *setting))
            found.append(("Table 6", "hours", row[f"{bits}_hours"], *setting))
    return found


def _noise() -> list[str]:
    """Shows the gains of Q-VLM in Table 2 beside the uncertainty of a difference."""
    printed = published("table2").query("method != 'FP'")
    lines = []
    by_setting = {_setting(row): float(row["Avg"]) for row in rows(printed)}
    for model, bits in dict.fromkeys((model, bits) for model, bits, _ in by_setting):
        averages = {method: by_setting[model, bits, method] for method in ("QLoRA", "AWQ", "Q-VLM")}
        for other in ("QLoRA", "AWQ"):
            gain = averages["Q-VLM"] - averages[other]
            shares = [averages[name] / 100 for name in ("Q-VLM", other)]
            apart = 196 * sum(p * (1 - p) / PUBLISHED_QUESTIONS for p in shares) ** 0.5
            # Paired on 10 % of changed answers, which a table of averages does not show.
            paired = 196 * (0.10 / PUBLISHED_QUESTIONS) ** 0.5
            questions = f"{gain * PUBLISHED_QUESTIONS / 100:.0f}"
            bounds = [f"+-{apart:.2f}", f"+-{paired:.2f}"]
            lines.append([label(model), bits, f"Q-VLM - {other}", signed(gain), questions, *bounds])
    small = sum(float(line[3]) < float(line[5][2:]) for line in lines)
    header = ["model", "bits", "comparison", "gain", "in questions"]
    return [
        "The paper prints no interval. Over the choice of the questions alone, a difference of two "
        f"averages has the 95 % half-width of *apart* if nothing else is known. {small} of these "
        f"{len(lines)} gains are smaller. Methods that answer the same questions can be told apart "
        "more sharply, but that needs their answers: *paired* assumes that a tenth of the answers "
        "is right with one of the two methods only. Neither covers the draw of the calibration "
        "set.",
        table([*header, "apart", "paired"], lines, left=3),
    ]


def _copies() -> list[str]:
    sentence = (
        "Table {table}, {name}, {column}: {printed:.2f} in one copy, {other_copy:.2f} in another."
    )
    found = rows(published("variants"))
    return [bullets([sentence.format(**row, name=" ".join(_name(row))) for row in found])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = table_parser("audit", "Checks the paper's printed numbers against each other.")

    def work(options: Any) -> None:
        text = page(made_with(parser, options, "out"))
        write_files({options.out / "audit.md": text})
        print(text, end="")

    return run_command(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())

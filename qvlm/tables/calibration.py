"""`python -m qvlm.tables.calibration`: what methods are calibrated on, against methods.

The paper calibrates on image-text pairs, and half of ScienceQA's questions have no image. Whether
static ranges of pairs serve the other half shows only if the calibration problems vary.
"""

import sys
from collections.abc import Sequence

import pandas as pd

from qvlm.evaluation.metrics import CLASSES
from qvlm.markdown import bullets, table
from qvlm.records.record import Record
from qvlm.tables.command import run_pure
from qvlm.tables.comparison import Comparison, compare_records, drop
from qvlm.tables.crossed import Crossed, crossed_by
from qvlm.tables.granularity import GRANULARITIES, activations
from qvlm.tables.labels import FP, method_order
from qvlm.tables.report import (
    interval,
    left_out,
    made_by,
    number,
    p_value,
    paired_interval,
    signed,
)

NAME = "calibration"
# Value of `calibration.images` -> how the page calls it.
SETS = {"only": "image-text pairs", "any": "all problems"}
COLUMNS = (
    *("model", "bits", "method", "calibration", "draw", "n", "accuracy", "ci_low", "ci_high"),
    *(*(f"accuracy_{name}" for name in CLASSES), "run"),
)
HEAD = """\
# What the calibration problems do

The same methods, calibrated on as many problems of two kinds: *image-text pairs*, which are the
paper's and the default, and a sample of *all problems*, of which half have no image. Activations of
the language model have static scales per channel. Accuracy is in percent on all questions, and an
answer that names no choice counts as wrong.

*difference* is what a sample of all problems brings, in points, on the same questions. The tables
are of one draw of the problems, so an interval covers questions and no other draws. What other
draws there are stand at the end."""
CLASS_NOTE = "The difference by class of question, in points:"
DRAWS_NOTE = (
    "Accuracy after calibration on other draws of the problems. Intervals are of each alone."
)


def cross(records: Sequence[Record]) -> Crossed:
    """Chooses the records of each kind and draw of problems as for a table of its own."""
    static = [
        record
        for record in records
        if record.bit_widths.is_full_precision
        or (
            ("calibration" in record.run["influences"])
            and activations(record) == GRANULARITIES["per_channel"]
        )
    ]
    quantized = [record for record in static if not record.bit_widths.is_full_precision]
    draws = sorted({draw(record) for record in quantized})
    settings = [f"{words}, draw {at}" for at in draws for words in SETS.values()]
    return crossed_by(
        static,
        lambda record: f"{kind(record)}, draw {draw(record)}",
        settings,
        ["calibration.images", "calibration.seed"],
    )


def kind(record: Record) -> str:
    """Says in words which problems a quantized record was calibrated on."""
    images = str(record.run["influences"]["calibration"]["images"])
    return SETS.get(images, images)


def draw(record: Record) -> int:
    """Returns the number of the draw of a quantized record's calibration problems."""
    return int(record.run["influences"]["calibration"]["seed"])


def page(crossed: Crossed, command: str) -> str:
    """Returns the page.

    Args:
        crossed: Records from `cross`.
        command: Command that regenerates the page.
    """
    parts = [HEAD]
    others = []
    for model, records in crossed.shown.items():
        full = crossed.full.get(model)
        for bits in dict.fromkeys(record.bits for record in records):
            by_draw = _pairs([record for record in records if record.bits == bits])
            for place, (at, pairs) in enumerate(by_draw.items()):
                if place == 0:
                    parts += [f"## {model}, {bits}", *_tables(pairs, full)]
                else:
                    others += [_other_draw(at, *pair) for pair in pairs]
    if others:
        header = ["model", "bits", "method", "draw", *SETS.values(), "difference", "95 % interval"]
        parts += ["## Other draws", DRAWS_NOTE, table(header, others, left=3)]
    parts += left_out(crossed.selection)
    parts += made_by(crossed.selection.shown, command)
    return "\n\n".join(parts) + "\n"


def _pairs(records: Sequence[Record]) -> dict[int, list[tuple[Record, Record]]]:
    """The records of each method that has both kinds, image-text pairs first, by draw."""
    found = {(draw(record), record.method, kind(record)): record for record in records}
    pairs, every = SETS.values()
    by_draw: dict[int, list[tuple[Record, Record]]] = {}
    cells = {key[:2] for key in found}
    for at, method in sorted(cells, key=lambda cell: (cell[0], method_order(cell[1]))):
        own, other = (found.get((at, method, words)) for words in (pairs, every))
        if own is not None and other is not None:
            by_draw.setdefault(at, []).append((own, other))
    return by_draw


def _other_draw(at: int, own: Record, every: Record) -> list[str]:
    """The row of a method after another draw."""
    shown = [number(row.metrics["classes"]["Avg"]["accuracy"]) for row in (own, every)]
    difference = drop(every, own)
    found = ["", "not the same questions"]
    if difference is not None:
        found = [signed(difference.difference), paired_interval(difference)]
    return [own.model, own.bits, own.method, str(at), *shown, *found]


def _tables(pairs: Sequence[tuple[Record, Record]], full: Record | None) -> list[str]:
    first, second = SETS.values()
    named = [(second, every, first, own) for own, every in pairs]
    compared, impossible = compare_records(named)
    header = ["method", first, "95 % interval", second, "95 % interval"]
    header += ["difference", "95 % interval", "p, Holm", "verdict"]
    lines = []
    if full is not None:
        average = full.metrics["classes"]["Avg"]
        lines.append([f"**{FP}**", number(average["accuracy"]), interval(average), *[""] * 6])
    if impossible:
        return [bullets([f"Not tested: {sentence}." for sentence in impossible])]
    for (own, every), found in zip(pairs, compared, strict=True):
        averages = [record.metrics["classes"]["Avg"] for record in (own, every)]
        shown = [part for row in averages for part in (number(row["accuracy"]), interval(row))]
        lines.append([f"**{own.method}**", *shown, *_compared(found)])
    classes = [
        [own.method, *(_by_class(own, every, name) for name in CLASSES)] for own, every in pairs
    ]
    return [table(header, lines), CLASS_NOTE, table(["method", *CLASSES], classes)]


def _compared(found: Comparison) -> list[str]:
    difference = found.difference
    return [
        *(signed(difference.difference), paired_interval(difference)),
        *(p_value(found.p_holm), found.verdict),
    ]


def _by_class(own: Record, every: Record, name: str) -> str:
    rows = [record.metrics["classes"][name] for record in (own, every)]
    if not all(row["n"] for row in rows):
        return ""
    return signed(rows[1]["accuracy"] - rows[0]["accuracy"])


def long(crossed: Crossed) -> pd.DataFrame:
    """Returns the rows of the CSV, with the columns `COLUMNS`; accuracy is in percent."""
    found = []
    for record in crossed.selection.shown:
        classes = record.metrics["classes"]
        whole = record.bit_widths.is_full_precision
        found.append(
            {
                "model": record.model,
                **dict(method=record.method, bits=record.bits),
                "calibration": "" if whole else kind(record),
                "draw": None if whole else draw(record),
                **{key: classes["Avg"][key] for key in ("n", "accuracy", "ci_low", "ci_high")},
                **{f"accuracy_{name}": classes[name]["accuracy"] for name in CLASSES},
                "run": record.name,
            }
        )
    return pd.DataFrame(found, columns=list(COLUMNS))


def texts_of(records: Sequence[Record], command: str) -> dict[str, str]:
    """Returns the text of the two files by their names."""
    crossed = cross(records)
    csv = long(crossed).to_csv(index=False, float_format="%.2f", lineterminator="\n")
    return {f"{NAME}.csv": csv, f"{NAME}.md": page(crossed, command)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    about = "Compares kinds of calibration problems from recorded runs."
    return run_pure(NAME, about, texts_of, lambda found: cross(found).selection.all(), arguments)


if __name__ == "__main__":
    sys.exit(main())

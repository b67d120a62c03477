"""Table 2: `python -m qvlm.tables.table2` turns the records of a folder into CSV and Markdown.

The table is a pure function of the records: nothing is run, and the same records give the same
bytes. The CSV has one row per model, bit widths, method and class. The Markdown page shows the same
records, what they cost, whether methods differ, and how the page was made.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qvlm.bits import BitWidths
from qvlm.evaluation.metrics import CLASSES, wilson
from qvlm.markdown import bullets, table
from qvlm.records.record import Record
from qvlm.tables import command
from qvlm.tables.comparison import changed, compare, drop
from qvlm.tables.labels import FP, PAPER, REAL
from qvlm.tables.published import (
    average_gaps,
    label,
    paper_model,
    published,
    rows,
    table2_values,
)
from qvlm.tables.report import (
    NOT_MEASURED,
    NOT_RECORDED,
    interval,
    left_out,
    made_by,
    number,
    paired_interval,
    paired_tests,
    signed,
    with_interval,
)
from qvlm.tables.selection import Selection, of_whole_method, select

COLUMNS = (
    *("model", "bits", "method", "class", "n", "accuracy", "ci_low", "ci_high", "unparsable"),
    *("changed", "kl", "kl_error", "paper_model", "paper_accuracy", "run"),
)

TITLE = "# Table 2: accuracy in percent"
HEAD = """\
NAT, SOC and LAN are the subjects natural, social and language science. TXT questions have a text as
context, IMG questions an image, NO questions neither. G1-6 and G7-12 are school grades. Avg is over
all questions. Answers are generated, and an answer that names no choice counts as {unparsable}.
`WxAy` means weights of x bits and activations of y bits. Intervals are Wilson's.

Two more measures stand beside accuracy. *Changed* is the share of questions whose answer is not
that of full precision, right or wrong. *KL* is the divergence of the next token's distribution from
that of full precision, in nats per token of the expected answer, with the interval of a mean over
problems. It sees differences that no answer shows, on fewer questions."""

PRINTED = """\
Rows that begin with *paper* are what the paper prints for the larger model that ours stands for, on
other questions. Compare the order of the methods and the size of their drops with them, not the
values."""

CUT = "Cut: share of answers that reached the limit of new tokens and were cut there."
LEVELS = (
    "Levels: most distinct weights / inputs per scale that entered any layer's product. A probed "
    "layer was reached by no question and was run on random inputs. An uncalibrated layer saw no "
    "calibration token."
)


def build(records: Iterable[Record]) -> pd.DataFrame:
    """Returns the rows of the CSV for the records that may be shown.

    Returns:
        Frame with the columns `COLUMNS`. Shares are in percent with two decimals, and missing where
        a class has no question. `paper_model` is the paper's model that a row's model stands for.
        `paper_accuracy` is what the paper prints for that model, bit widths, method and class, or
        missing. `changed` is the share of questions whose answer differs from full precision's,
        missing where there is no such record. `kl`, in nats per token of the expected answer, and
        its standard error `kl_error` stand in the rows of class Avg, where they were measured.
    """
    return long(select(records))


def long(selection: Selection) -> pd.DataFrame:
    """Returns the rows of the CSV for a selection (see `build`)."""
    found = []
    references = _references(selection)
    for record in selection.shown:
        paper = paper_model(record)
        printed = table2_values(paper).get((record.bits, record.method), {}) if paper else {}
        differs = changed(record, references.get(record.model))
        kl = record.metrics.get("kl") or {}
        for name, members in CLASSES.items():
            row = record.metrics["classes"][name]
            own = members(record.predictions).to_numpy(dtype=bool)
            shares = ("accuracy", "ci_low", "ci_high", "unparsable")
            found.append(
                {
                    **dict(model=record.model, bits=record.bits, method=record.method),
                    **{"class": name, "n": row["n"]},
                    **{key: None if row[key] is None else round(row[key], 2) for key in shares},
                    "changed": _share(differs, own),
                    "kl": kl.get("mean") if name == "Avg" else None,
                    "kl_error": kl.get("standard_error") if name == "Avg" else None,
                    "paper_model": label(paper) if paper else None,
                    "paper_accuracy": printed.get(name),
                    "run": record.name,
                }
            )
    frame = pd.DataFrame(found, columns=list(COLUMNS))
    numbers = ["accuracy", "ci_low", "ci_high", "unparsable", "changed", "kl", "kl_error"]
    kinds = dict.fromkeys([*numbers, "paper_accuracy"], "float64")
    return frame.astype({"n": "int64", **kinds}).round({"kl": 5, "kl_error": 5})


def _references(selection: Selection) -> dict[str, Record]:
    """Returns the full-precision record of each model that has one."""
    return {r.model: r for r in selection.shown if r.bit_widths.is_full_precision}


def _share(mask: NDArray[np.bool_] | None, members: NDArray[np.bool_]) -> float | None:
    """Returns the share of the members of a class that are in a mask, in percent."""
    if mask is None or not members.any():
        return None
    return round(100 * float(mask[members].mean()), 2)


def render(selection: Selection, made_with: str) -> str:
    """Returns the page.

    Args:
        selection: Records to show.
        made_with: Command that regenerates the page.
    """
    return page([TITLE, HEAD, PRINTED], selection, made_with)


def page(head: Sequence[str], selection: Selection, made_with: str) -> str:
    """Returns a page that looks like Table 2.

    Args:
        head: Its title and the paragraphs below it; `{unparsable}` is what such answers count as.
        selection: Records to show.
        made_with: Command that regenerates the page.
    """
    rules = sorted({record.metrics.get("unparsable_rule", "wrong") for record in selection.shown})
    words = {"wrong": "wrong", "random": "a random choice"}
    counted = " or ".join(words.get(rule, rule) for rule in rules) or "wrong"
    parts = [paragraph.format(unparsable=counted) for paragraph in head]
    for model, cells in selection.by_cell().items():
        parts += _model(model, cells)
    parts += left_out(selection)
    parts += _printed_numbers(selection.shown)
    parts += made_by(selection.shown, made_with, [CUT, LEVELS])
    return "\n\n".join(parts) + "\n"


def _model(model: str, cells: dict[BitWidths, list[Record]]) -> list[str]:
    """Returns one model's sections, one per bit widths."""
    references = cells.get(BitWidths(), [])
    reference = references[0] if references else None
    paper = paper_model(next(iter(cells.values()))[0])
    role = f", which stands for {label(paper)}" if paper else ""
    parts = [f"## {model}{role}"]
    quantized = {bits: records for bits, records in cells.items() if not bits.is_full_precision}
    if reference is None:
        parts.append(
            f"**{model} has no full-precision record**: how far its rows drop is not known."
        )
    if not quantized:
        parts += [f"### {model}, {FP}", _accuracy(references, reference)]
    for bits, records in quantized.items():
        parts += [f"### {model}, {bits}", _accuracy([*references, *records], reference)]
        parts += [f"Cost and proof, {model} at {bits}:", _cost(records)]
        families = compare(records) or {records[0].method: ([], [])}
        for method, family in families.items():
            parts += [f"Paired tests of {method}, {model} at {bits}:", paired_tests(*family)]
    return parts


def _accuracy(records: Sequence[Record], reference: Record | None) -> str:
    """Returns the table of accuracies: per record a row, its intervals, and the paper's row."""
    counts = [str(records[0].metrics["classes"][name]["n"]) for name in CLASSES]
    lines = [["", "questions", *counts, "", "", ""]]
    for record, before in zip(records, [None, *records], strict=False):
        if before and before.method in PAPER and record.method not in PAPER:
            lines.append(["*not in the paper*", *[""] * (len(lines[0]) - 1)])
        classes = [record.metrics["classes"][name] for name in CLASSES]
        fall = None if record is reference else drop(record, reference)
        points = signed(fall.difference) if fall else ""
        measured = [number(row["accuracy"]) for row in classes]
        beside = (
            [("", "")] * 2 if record is reference else [_changed(record, reference), _kl(record)]
        )
        values, bounds = zip(*beside, strict=True)
        lines.append([f"**{record.method}**", "measured", *measured, points, *values])
        fall_bounds = paired_interval(fall) if fall else ""
        lines.append(["", "95 % interval", *map(interval, classes), fall_bounds, *bounds])
        lines += _paper_row(record)
    header = ["method", "", *CLASSES, "Avg against FP", "changed, %", "KL"]
    return table(header, lines, left=2)


def _changed(record: Record, reference: Record | None) -> tuple[str, str]:
    """Returns the share of answers that differ from full precision's, and its interval."""
    differs = changed(record, reference)
    if differs is None:
        return "not known", ""
    low, high = wilson(int(differs.sum()), len(differs))
    return f"{100 * differs.mean():.2f}", f"{100 * low:.1f}-{100 * high:.1f}"


def _kl(record: Record) -> tuple[str, str]:
    """Returns the divergence from full precision, and its interval."""
    kl = record.metrics.get("kl")
    return with_interval(kl) if kl else (NOT_MEASURED, "")


def _paper_row(record: Record) -> list[list[str]]:
    """Returns the paper's row for the same bit widths and method, if there is one."""
    paper = paper_model(record)
    values = table2_values(paper) if paper else {}
    own = values.get((record.bits, record.method))
    if paper is None or own is None:
        return []
    cells = [f"*{own[name]:.2f}*" if name in own else "" for name in CLASSES]
    full = values[FP, FP]["Avg"]
    change = "" if record.bit_widths.is_full_precision else f"*{signed(own['Avg'] - full)}*"
    return [["", f"*paper, {label(paper)}*", *cells, change, "", ""]]


def _cost(records: Sequence[Record]) -> str:
    """Returns the table of what the cells cost and of what their layers prove."""
    columns: dict[str, Callable[[Record], str]] = {
        "method": lambda r: r.method,
        "unparsable, %": lambda r: number(r.metrics["classes"]["Avg"]["unparsable"]),
        "cut, %": lambda r: number(r.metrics["cut"]) if "cut" in r.metrics else NOT_RECORDED,
        "search, s": lambda r: f"{r.run['report']['search_seconds']:.1f}",
        "candidates": lambda r: str(r.run["report"]["candidates"]),
        "quantize, s": lambda r: f"{r.run['stages']['quantize']['seconds']:.1f}",
        "peak, MiB": lambda r: f"{max(s['peak_mib'] for s in r.run['stages'].values()):.0f}",
        "layers": lambda r: str(len(r.layers)),
        "levels": _levels,
        "probed": lambda r: str(sum(bool(row.get("probed")) for row in r.layers)),
        "uncalibrated": lambda r: str(len(r.run.get("uncalibrated", []))),
    }
    return table(list(columns), [[cell(record) for cell in columns.values()] for record in records])


def _levels(record: Record) -> str:
    weights = max(row["weight_levels"] for row in record.layers)
    inputs = max(row["input_levels"] for row in record.layers)
    return f"{weights} / {inputs}"


_GAP = "Avg is {printed:.2f}, its subjects weighted by their questions give {computed:.2f}"
_VARIANT = "{column} is {printed:.2f} in one copy of the paper and {other_copy:.2f} in another"


def _printed_numbers(records: Sequence[Record]) -> list[str]:
    """Returns the section on what does not add up in the printed numbers of the page."""
    shown = {(paper_model(r), r.bits, r.method) for r in records}
    gaps = rows(average_gaps(published("table2")))
    variants = rows(published("variants").query("table == 2"))
    sentences = [
        f"{label(row['model'])} {row['bits']} {row['method']}: {text.format(**row)}"
        for found, text in ((gaps, _GAP), (variants, _VARIANT))
        for row in found
        if (row["model"], row["bits"], row["method"]) in shown
    ]
    if not sentences:
        return []
    return ["## The printed numbers", "Shown as the paper prints them:", bullets(sentences)]


def wanted(record: Record) -> bool:
    """Whether a record concerns this table; the real language model has a page of its own."""
    return of_whole_method(record) and record.model != REAL


TABLE = command.Table("table2", "Table 2", wanted, long, render)


def write(records: Iterable[Record], out: Path, made_with: str) -> tuple[Path, Path]:
    """Writes `table2.csv` and `table2.md`, each of them whole or not at all.

    Args:
        records: Records of a folder. `select` decides which of them are shown.
        out: Folder for the files. It is created if needed.
        made_with: Command that the page names as the one that regenerates it.

    Returns:
        Paths of the two files.

    Raises:
        UserError: If the folder cannot be written.
    """
    return command.write(TABLE, select(records, wanted), out, made_with)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return command.run(TABLE, arguments)


if __name__ == "__main__":
    sys.exit(main())

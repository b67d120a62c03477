"""The sortable tables of the report: our values, with the paper's beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from qvlm.evaluation.metrics import CLASSES
from qvlm.records.record import Record
from qvlm.report.content import Content
from qvlm.tables import table1, table5
from qvlm.tables.comparison import changed, drop
from qvlm.tables.labels import bits_order, method_order
from qvlm.tables.published import label, paper_model, table2_values
from qvlm.tables.report import interval, paired_interval, signed, with_interval
from qvlm.tables.table_real import long

NOT_MEASURED = "not measured"
TABLES = {table.name: table for table in (table1.TABLE, table5.TABLE)}


@dataclass(frozen=True)
class Value:
    """A cell of a table.

    Attributes:
        text: What the cell shows.
        sort: Number by which rows are sorted, or None to sort by the text.
        below: Small text below it, such as an interval.
        paper: The paper's value, or "".
        about: Sentence for the card, or "".
        runs: Numbers of the records that the value comes from.
    """

    text: str
    sort: float | None = None
    below: str = ""
    about: str = ""
    runs: tuple[int, ...] = ()
    paper: str = ""


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        caption: What the table shows.
        header: Titles of the columns; the first two columns name the row.
        rows: Cells.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Value]]


def accuracy(content: Content) -> list[Grid]:
    """Returns Table 2 per model: accuracy by class, with the paper's value below ours."""
    grids = []
    for model in dict.fromkeys(record.model for record in content.whole.shown):
        records = [record for record in content.whole.shown if record.model == model]
        paper = paper_model(records[0])
        printed = table2_values(paper) if paper else {}
        counts = {c: records[0].metrics["classes"][c]["n"] for c in CLASSES}
        header = ["method", "bits", *CLASSES, "against FP", "changed, %", "unparsable, %", "KL"]
        rows = []
        for record in records:
            number = content.numbers[record.name]
            values = printed.get((record.bits, record.method), {})
            cells = [
                Value(record.method, float(method_order(record.method)[0]), runs=(number,)),
                Value(record.bits, float(bits_order(record.bit_widths)[0])),
                *(_class(record, name, values.get(name), number) for name in CLASSES),
                *_against(record, content),
            ]
            average = record.metrics["classes"]["Avg"]
            cells.append(_number(average["unparsable"], "%", number, "answers that name no choice"))
            cells.append(_divergence(record, number))
            rows.append(cells)
        role = f" Small italic numbers are the paper's for {label(paper)}." if paper else ""
        asked = ", ".join(f"{name} {count}" for name, count in counts.items())
        caption = f"{model}: accuracy in percent by class.{role} Questions: {asked}."
        grids.append(Grid(caption, header, rows))
    return grids


def parts(content: Content) -> list[Grid]:
    """Returns Tables 1 and 5, as far as the records hold them."""
    grids = []
    for name, selection in content.parts.items():
        frame = TABLES[name].long(selection)
        grids.append(from_frame(f"{TABLES[name].title}, from the records.", frame, content.numbers))
    return grids


def texts(content: Content) -> list[Grid]:
    """Returns the measures of the records on plain text, if there are any."""
    if not content.texts:
        return []
    return [from_frame("Plain text, from the records.", long(content.texts), content.numbers)]


_NAMES = {
    "ci_low": "95 % low",
    "ci_high": "95 % high",
    "search_seconds": "search, s",
    "quantize_peak_mib": "peak, MiB",
    "paper_search_hours": "paper: search, h",
    "paper_memory_gib": "paper: memory, GiB",
    "paper_accuracy": "paper: accuracy",
    "n": "questions",
}


def from_frame(caption: str, frame: pd.DataFrame, numbers: Mapping[str, int]) -> Grid:
    """Returns the table of a CSV of ours. A column "run" names the record of each row.

    Args:
        caption: What the table shows.
        frame: Rows of the CSV.
        numbers: Number of each record by its name.
    """
    first = [name for name in ("method", "bits") if name in frame]
    # A column that is empty says nothing. One with the same text everywhere is in the caption.
    names = [str(name) for name in frame.columns]
    kept = [c for c in names if c not in (*first, "run") and frame[c].notna().any()]
    same = [c for c in kept if frame[c].dtype == object and frame[c].nunique(dropna=False) == 1]
    said = [f"{c.replace('_', ' ')}: {frame[c].iloc[0]}" for c in same]
    columns = [*first, *(c for c in kept if c not in same)]
    rows = []
    for row in frame.to_dict("records"):
        number = numbers.get(str(row.get("run")))
        runs = () if number is None else (number,)
        rows.append([_plain(row[column], runs) for column in columns])
    header = [_NAMES.get(c, c.replace("_", " ").replace("paper ", "paper: ")) for c in columns]
    return Grid(" ".join([caption, *(f"{text}." for text in said)]), header, rows)


def _plain(value: Any, runs: tuple[int, ...]) -> Value:
    if pd.isna(value):
        return Value("-", float("-inf"))
    if isinstance(value, bool | str):
        return Value(str(value))
    text = f"{value:.0f}" if float(value).is_integer() else f"{value:.4g}"
    if 10 <= abs(value) < 1000 and not float(value).is_integer():
        text = f"{value:.2f}"
    return Value(text, float(value), runs=runs)


def _class(record: Record, name: str, paper: float | None, number: int) -> Value:
    row = record.metrics["classes"][name]
    if not row["n"]:
        return Value("-", float("-inf"))
    about = (
        f"{record.method} {record.bits}, {name}: {row['accuracy']:.2f} % of {row['n']} questions, "
        f"95 % interval {interval(row)}"
    )
    printed = "" if paper is None else f"{paper:.2f}"
    return Value(f"{row['accuracy']:.2f}", row["accuracy"], "", about, (number,), printed)


def _against(record: Record, content: Content) -> list[Value]:
    """Returns what a record lost against full precision, and how many answers it changed."""
    reference = content.reference(record)
    fall = drop(record, reference)
    if reference is None or fall is None:
        return [Value(NOT_MEASURED, float("-inf"))] * 2
    if record.name == reference.name:
        return [Value("-", 0.0), Value("-", 0.0)]
    runs = (content.numbers[record.name], content.numbers[reference.name])
    about = f"{record.method} {record.bits} - FP: {signed(fall.difference)} points"
    differs = changed(record, reference)
    assert differs is not None  # `drop` compared them
    share = 100 * float(differs.mean())
    text = f"{share:.1f} % of the answers differ from those of full precision"
    return [
        Value(signed(fall.difference), fall.difference, paired_interval(fall), about, runs),
        Value(f"{share:.1f}", share, "", text, runs),
    ]


def _number(value: float | None, unit: str, number: int, what: str) -> Value:
    if value is None:
        return Value("-", float("-inf"))
    return Value(f"{value:.2f}", value, "", f"{value:.2f} {unit} {what}", (number,))


def _divergence(record: Record, number: int) -> Value:
    kl = record.metrics.get("kl")
    if record.bit_widths.is_full_precision:
        return Value("-", 0.0)
    if not kl:
        return Value(NOT_MEASURED, float("-inf"))
    value, ends = with_interval(kl)
    about = f"{kl['mean']:.5f} nats per answer token from full precision"
    return Value(value, kl["mean"], ends, about, (number,))

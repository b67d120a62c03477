"""The comparison of the cells of a sweep: a table for each model and data set."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qvlm.records.record import Record
from qvlm.summary.parts import (
    accuracy,
    asked,
    difference,
    find_reference,
    new_table,
    refused,
    report_place,
    scores_of,
    seconds,
)
from qvlm.tables.labels import bits_order, method_order
from qvlm.tables.proof import fault
from qvlm.tables.report import NONE
from qvlm.validation import shown


def sweep_summary(records: Sequence[Record]) -> RenderableType:
    """Returns a table for each model and data set, one row for each cell."""
    groups: defaultdict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.model, asked(record)].append(record)
    parts: list[RenderableType] = []
    for (model, questions), cells in groups.items():
        cells.sort(key=lambda cell: (*bits_order(cell.bit_widths), *method_order(cell.method)))
        proven: defaultdict[str, dict[str, str]] = defaultdict(dict)
        for cell in cells:
            proven[_quantizer(cell)] |= {row["layer"]: cell.name for row in cell.layers}
        faults = {
            cell.name: reason for cell in cells if (reason := fault(cell, proven[_quantizer(cell)]))
        }
        parts += [Text(), Text.assemble((model, "bold"), f" on {questions}")]
        parts.append(_comparison(cells, faults))
        parts += [
            refused(f"{cell.method} {cell.bits}", faults[cell.name])
            for cell in cells
            if cell.name in faults
        ]
    folders = dict.fromkeys(str(record.path.parent) for record in records)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("records", Text(", ".join(folders), overflow="fold"))
    facts.add_row("report", report_place(records))
    return Group(*parts, facts)


def _comparison(records: Sequence[Record], faults: Mapping[str, str]) -> Table:
    """Returns the table of one model's cells: numbers, proofs, and the options that differ.

    Args:
        records: Records of the cells, in order.
        faults: Reason why tables refuse a record, by the name of each that they refuse.
    """
    options = _varying(records)
    named = [name.replace(".", ".\n") for name in options]
    table = new_table("method", "bits", *named, left=2 + len(options))
    kind = records[0].kind
    scored = {record.name: _scores(record) for record in records if kind == "tasks"}
    named_scores = list(dict.fromkeys(chain.from_iterable(scored.values())))
    for column in (*_measures(kind, named_scores), "time, s"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("bits proven", justify="right")
    for record in records:
        same = record.bit_widths.is_full_precision
        if kind == "tasks":
            numbers = [scored[record.name].get(name, NONE) for name in named_scores]
        elif kind == "text":
            numbers = [_text_number(record, "kl"), _text_number(record, "perplexity")]
        else:
            reference = None if same else find_reference(record, records)
            numbers = [accuracy(record.metrics["classes"]["Avg"])]
            numbers.append("" if same else difference(record, reference, "Avg"))
        table.add_row(
            record.method,
            "" if same else record.bits,
            *(values.get(record.name, "") for values in options.values()),
            *numbers,
            f"{seconds(record):.1f}",
            Text("NO", "bold red") if record.name in faults else "" if same else "yes",
        )
    return table


def _quantizer(record: Record) -> str:
    """Names what decides which layers are quantized: the settings of the quantizer."""
    return repr(record.run["influences"].get("quantizer"))


def _scores(record: Record) -> dict[str, str]:
    """Returns the values of a record's tasks by their headings."""
    return {f"{task},\n{metric}": f"{value:.4g}" for task, metric, value, _ in scores_of(record)}


def _measures(kind: str, scores: Sequence[str]) -> list[str]:
    """Returns the headings of what the cells of a sweep are compared by."""
    if kind == "tasks":
        return [*scores]
    if kind == "text":
        return ["KL, nats", "perplexity"]
    return ["accuracy, %", "against FP, points"]


def _text_number(record: Record, name: str) -> str:
    measure = record.metrics["text"][name]
    return NONE if measure is None else f"{measure['value']:.3f}"


def _varying(records: Sequence[Record]) -> dict[str, dict[str, str]]:
    """Returns the options in which cells differ beside model, method and bits.

    Returns:
        Value for each record that has the option, by the record's name, by the option's name.
    """
    own = {record.name: dict(_flat(record.run["influences"])) for record in records}
    found: dict[str, dict[str, str]] = {}
    for key in dict.fromkeys(chain.from_iterable(own.values())):
        if key.startswith(("model.", "bits.")) or key == "method._target_":
            continue
        having = [record for record in records if key in own[record.name]]
        methods = {record.method for record in having} if key.startswith("method.") else {""}
        for method in methods:
            values = {r.name: shown(own[r.name][key]) for r in having if method in ("", r.method)}
            if len(set(values.values())) > 1:
                found[key] = found.get(key, {}) | values
    return found


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

"""Tables 1 and 5 share a shape: what a few variants of one method reach, and what they cost.

Per model and bit width a row per variant, the paper's row for it below, and paired tests between
the variants. The paper's memory is that of a packed model on a GPU; ours, the peak of the process
while it quantizes in simulation, says what the search needs and nothing of the model's size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from qvlm.markdown import table
from qvlm.records.record import Record
from qvlm.tables.comparison import compare_pairs, drop
from qvlm.tables.published import label
from qvlm.tables.report import (
    NONE,
    REFUSED,
    left_out,
    made_by,
    number,
    paired_interval,
    paired_tests,
    signed,
)
from qvlm.tables.selection import FP, Selection, bits_order, is_ordinary

COLUMNS = (
    *("model", "bits", "method", "n", "accuracy", "ci_low", "ci_high", "unparsable"),
    *("search_seconds", "candidates", "quantize_peak_mib", "paper_model", "paper_method"),
    *("paper_accuracy", "paper_search_hours", "paper_memory_gib", "run"),
)


@dataclass(frozen=True)
class Printed:
    """A row of the paper.

    Attributes:
        model, method: as the paper calls them.
        accuracy: in percent.
        search_hours: on the paper's GPU.
        memory_gib: of the packed model; None where the table has no such column.
    """

    model: str
    method: str
    accuracy: float
    search_hours: float
    memory_gib: float | None = None


@dataclass(frozen=True)
class Ablation:
    """What such a table shows.

    Attributes:
        head: the page's title and introduction.
        printed: (bits, method of ours) -> the paper's rows for it. Its keys name the methods.
        methods: ours, in the order shown.
        pairs: those that are tested against each other.
    """

    head: str
    printed: Mapping[tuple[str, str], Sequence[Printed]]
    methods: Sequence[str]
    pairs: Sequence[tuple[str, str]]

    def wanted(self, record: Record) -> bool:
        """Whether a record is this table's affair."""
        return record.method in (FP, *self.methods) and is_ordinary(record)

    def long(self, selection: Selection) -> pd.DataFrame:
        """`COLUMNS`, a row per model, bit width and method; accuracy in percent."""
        rows = []
        for record in selection.shown:
            average = record.metrics["classes"]["Avg"]
            paper = next(iter(self.printed.get((record.bits, record.method), [])), None)
            search = record.run["report"] if record.bits != FP else {}
            rows.append(
                {
                    **dict(model=record.model, bits=record.bits, method=record.method),
                    **{key: average[key] for key in ("n", "accuracy", "ci_low", "ci_high")},
                    "unparsable": average["unparsable"],
                    "search_seconds": search.get("search_seconds"),
                    "candidates": search.get("candidates"),
                    "quantize_peak_mib": _peak(record),
                    "paper_model": paper and label(paper.model),
                    "paper_method": paper and paper.method,
                    "paper_accuracy": paper and paper.accuracy,
                    "paper_search_hours": paper and paper.search_hours,
                    "paper_memory_gib": paper and paper.memory_gib,
                    "run": record.name,
                }
            )
        return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"candidates": "Int64"})

    def render(self, selection: Selection, command: str) -> str:
        """The page, with `command` as what regenerates it."""
        parts = [self.head]
        for model, widths in selection.by_cell().items():
            reference = next(iter(widths.get(FP, [])), None)
            for bits in sorted(widths, key=bits_order):
                if bits == FP:
                    continue
                records = sorted(widths[bits], key=lambda r: self.methods.index(r.method))
                parts += [f"## {model}, {bits}", self._rows(records, reference)]
                made, impossible = compare_pairs(records, self.pairs)
                parts.append(paired_tests(made, impossible))
        parts += ["## Refused rows", left_out(selection.refused, REFUSED, "None.")]
        if selection.set_aside:
            parts += ["## Records not shown", left_out(selection.set_aside, "", "None.")]
        return (
            "\n\n".join([*parts, "## How this was made", made_by(selection.shown, command)]) + "\n"
        )

    def _rows(self, records: Sequence[Record], reference: Record | None) -> str:
        header = ["method", "", "accuracy", "95 % interval", "against FP", "95 % interval"]
        header += ["search", "candidates", "memory"]
        rows = []
        for record in records:
            average, report = record.metrics["classes"]["Avg"], record.run["report"]
            fall = drop(record, reference)
            peak = _peak(record)
            rows.append(
                [
                    *(f"**{record.method}**", "measured", number(average["accuracy"])),
                    f"{average['ci_low']:.1f}-{average['ci_high']:.1f}" if average["n"] else NONE,
                    signed(fall.difference) if fall else "",
                    paired_interval(fall) if fall else "",
                    f"{report['search_seconds']:.1f} s",
                    str(report["candidates"]),
                    NONE if peak is None else f"{peak:.0f} MiB",
                ]
            )
            for paper in self.printed.get((record.bits, record.method), []):
                memory = "" if paper.memory_gib is None else f"*{paper.memory_gib:g} GiB*"
                name = f"*paper, {label(paper.model)}, {paper.method}*"
                cost = [f"*{paper.search_hours:g} h*", "", memory]
                rows.append(["", name, f"*{paper.accuracy:.2f}*", "", "", "", *cost])
        return table(header, rows, left=2)


def _peak(record: Record) -> float | None:
    """MiB that the process held at most while it quantized."""
    stages: dict[str, Any] = record.run["stages"]
    return stages["quantize"]["peak_mib"] if "quantize" in stages else None

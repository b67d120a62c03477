"""What Tables 1 and 5 have in common: variants of one method, their accuracy and their cost.

For each model and bit widths, the page has a row per variant with the paper's row below it, and
paired tests between the variants. The paper's memory is that of a packed model on a GPU. Ours is
the peak of the process while it quantizes in simulation: it says what the search needs, and nothing
about the size of the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from qvlm.markdown import table
from qvlm.records.record import Record
from qvlm.tables.command import Table
from qvlm.tables.comparison import compare_pairs, drop
from qvlm.tables.labels import FP
from qvlm.tables.published import label
from qvlm.tables.report import (
    NONE,
    interval,
    left_out,
    made_by,
    number,
    paired_interval,
    paired_tests,
    signed,
)
from qvlm.tables.selection import Selection, is_ordinary

COLUMNS = (
    *("model", "bits", "method", "n", "accuracy", "ci_low", "ci_high", "unparsable"),
    *("search_seconds", "candidates", "quantize_peak_mib", "paper_model", "paper_method"),
    *("paper_accuracy", "paper_search_hours", "paper_memory_gib", "run"),
)


@dataclass(frozen=True)
class Printed:
    """A row of the paper.

    Attributes:
        model: Name of the model in `paper/models.csv`.
        method: Name of the method in the paper.
        accuracy: Accuracy in percent.
        search_hours: Hours of search on the paper's GPU.
        memory_gib: GiB of the packed model; None where the table has no such column.
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
        head: Title and introduction of the page.
        printed: The paper's rows, by our (bits, method).
        methods: Our methods, in the order shown.
        pairs: Pairs of methods that are tested against each other.
    """

    head: str
    printed: Mapping[tuple[str, str], Sequence[Printed]]
    methods: Sequence[str]
    pairs: Sequence[tuple[str, str]]

    def table(self, name: str, title: str) -> Table:
        """Returns the table under a name and title."""
        return Table(name, title, self.wanted, self.long, self.render)

    def wanted(self, record: Record) -> bool:
        """Whether a record concerns this table."""
        return record.method in (FP, *self.methods) and is_ordinary(record)

    def long(self, selection: Selection) -> pd.DataFrame:
        """Returns one row per model, bit widths and method.

        Returns:
            Frame with the columns `COLUMNS`; accuracy is in percent.
        """
        rows = []
        for record in selection.shown:
            average = record.metrics["classes"]["Avg"]
            paper = next(iter(self.printed.get((record.bits, record.method), [])), None)
            search = {} if record.bit_widths.is_full_precision else record.run["report"]
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

    def render(self, selection: Selection, made_with: str) -> str:
        """Returns the page.

        Args:
            selection: Records to show.
            made_with: Command that regenerates the page.
        """
        parts = [self.head]
        for model, cells in selection.by_cell().items():
            reference = next((r for r in selection.shown if (r.model, r.bits) == (model, FP)), None)
            for bits, shown in cells.items():
                if bits.is_full_precision:
                    continue
                records = sorted(shown, key=lambda r: self.methods.index(r.method))
                parts += [f"## {model}, {bits}", self._rows(records, reference)]
                parts.append(paired_tests(*compare_pairs(records, self.pairs)))
        parts += left_out(selection)
        parts += made_by(selection.shown, made_with)
        return "\n\n".join(parts) + "\n"

    def _rows(self, records: Sequence[Record], reference: Record | None) -> str:
        """Returns the table of variants: per record a row, and the paper's rows for it."""
        header = ["method", "", "accuracy", "95 % interval", "against FP", "95 % interval"]
        header += ["search", "candidates", "memory"]
        rows = []
        for record in records:
            average, report = record.metrics["classes"]["Avg"], record.run["report"]
            fall, peak = drop(record, reference), _peak(record)
            rows.append(
                [
                    *(f"**{record.method}**", "measured", number(average["accuracy"])),
                    interval(average),
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
    """Returns the peak memory of the process while it quantized, in MiB."""
    stages = record.run["stages"]
    return stages["quantize"]["peak_mib"] if "quantize" in stages else None

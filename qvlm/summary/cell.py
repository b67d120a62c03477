"""The summary of one cell: accuracy or other measures, the proof of bits, and the folder."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qvlm.evaluation.metrics import CLASSES
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
)
from qvlm.tables.proof import fault
from qvlm.tables.report import NONE, number

TEXT_MEASURES = {
    "perplexity": "perplexity",
    "kl": "KL to full precision, nats per token",
    "agreement": "same token as full precision, %",
}
DESCRIBED_WIDTH = 92  # columns that the table of a cell needs with descriptions of the classes
WHAT = {
    "NAT": "natural science",
    "SOC": "social science",
    "LAN": "language science",
    "TXT": "with a text",
    "IMG": "with an image",
    "NO": "with neither",
    "G1-6": "grades 1 to 6",
    "G7-12": "grades 7 to 12",
    "Avg": "all questions",
}


def cell_summary(record: Record, described: bool = True) -> RenderableType:
    """Returns accuracy by class, what quantization cost, the proof of bits, and the folder.

    Args:
        record: Record of the cell.
        described: Whether the classes are described beside their names.
    """
    if record.kind != "problems":
        return _measures_summary(record)
    reference = find_reference(record)
    rows = record.metrics["classes"]
    full = reference.metrics["classes"] if reference else {}
    table = new_table("class", "questions", "accuracy, %")
    if reference:
        table.add_column("FP, %", justify="right", no_wrap=True)
        table.add_column("difference, points", justify="right", no_wrap=True)
    for name in CLASSES:
        cells = [f"{rows[name]['n']:,}", accuracy(rows[name])]
        if reference:
            cells += [number(full[name]["accuracy"]), difference(record, reference, name)]
        title = f"{name:<5} {WHAT[name]}" if described else name
        if name == "Avg":
            table.add_section()
        table.add_row(title, *cells, style="bold" if name == "Avg" else "")
    title = " ".join(dict.fromkeys([record.method, record.bits]))
    lines = [Text.assemble((f"{record.model}, {title}", "bold"), f" on {asked(record)}")]
    if not record.bit_widths.is_full_precision and reference is None:
        lines.append(Text("What it cost is not known. method=fp measures full precision."))
    facts = Table.grid(padding=(0, 2))
    facts.add_row("unparsable", f"{number(rows['Avg']['unparsable'])} %")
    facts.add_row("bits", _proof(record))
    facts.add_row("seconds", _stages(record))
    facts.add_row("record", Text(str(record.path), overflow="fold"))
    facts.add_row("report", report_place([record]))
    return Group(Text(), *lines, table, facts)


def _measures_summary(record: Record) -> RenderableType:
    """Returns the measures on plain text or tasks, the proof of bits, and the folder."""
    table = _text_measures(record) if record.kind == "text" else _task_scores(record)
    title = " ".join(dict.fromkeys([record.method, record.bits]))
    head = Text.assemble((f"{record.model}, {title}", "bold"), f" on {asked(record)}")
    facts = Table.grid(padding=(0, 2))
    facts.add_row("bits", _proof(record))
    facts.add_row("seconds", _stages(record))
    facts.add_row("record", Text(str(record.path), overflow="fold"))
    return Group(Text(), head, table, facts)


def _text_measures(record: Record) -> Table:
    table = new_table("measure", "value", "95 % interval")
    for name, unit in TEXT_MEASURES.items():
        measure = record.metrics["text"][name]
        if measure is not None:
            low, high = measure["low"], measure["high"]
            reach = NONE if low is None else f"{low:.3f} to {high:.3f}"
            table.add_row(unit, f"{measure['value']:.3f}", reach)
    return table


def _task_scores(record: Record) -> Table:
    table = new_table("task", "metric", "questions", "value", "standard error", left=2)
    tasks = record.metrics["tasks"]
    for task, metric, value, error in scores_of(record):
        samples = tasks["n-samples"].get(task)  # of a group there is none
        count = f"{samples['effective']:,}" if samples else ""
        table.add_row(task, metric, count, f"{value:.4g}", "" if error is None else f"{error:.2g}")
    return table


def _proof(record: Record) -> Text:
    """Says whether the layers of a record prove its bits."""
    if (reason := fault(record, {})) is not None:
        return refused("not proven", reason)
    if record.bit_widths.is_full_precision:
        return Text("nothing is quantized")
    weights = max(row["weight_levels"] for row in record.layers)
    inputs = max(row["input_levels"] for row in record.layers)
    values = f"at most {weights} weight and {inputs} input values per scale"
    return Text(f"proven in {len(record.layers)} layers: {values}", "green")


def _stages(record: Record) -> str:
    parts = [f"{name} {stage['seconds']:.1f}" for name, stage in record.run["stages"].items()]
    return ", ".join(parts)

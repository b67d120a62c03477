"""What a command prints at its end: the numbers of a cell, or the comparison of a sweep's cells.

Both are functions of records, like tables, and check them by the rules of tables. They show what
was run, whatever the experiment; `qvlm.tables` decides what may stand side by side on a page.

rich draws the tables: with lines and colors on a terminal, and as plain text elsewhere.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from qvlm.command import program
from qvlm.errors import RunError
from qvlm.evaluation.metrics import CLASSES
from qvlm.evaluation.tasks import Score, scores
from qvlm.records.record import Record, read_run
from qvlm.tables.comparison import drop
from qvlm.tables.labels import bits_order, method_order
from qvlm.tables.proof import fault
from qvlm.tables.report import NONE, interval, number, paired_interval, signed
from qvlm.validation import shown

PLAIN_WIDTH = 120  # columns, where no terminal says how many there are
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


def print_summary(paths: Sequence[Path]) -> None:
    """Prints the summary of one recorded cell, or the comparison of several.

    Args:
        paths: Folders that the cells left. A packed model without a record is left out.
    """
    try:
        records = [Record.load(path) for path in dict.fromkeys(paths) if _is_recorded(path)]
    except RunError as error:  # the cells are recorded, and tables say what is wrong with them
        print(f"warning: there is no summary, because {error}", file=sys.stderr)
        return
    if records:
        console = Console(highlight=False)
        console.width = console.width if console.is_terminal else PLAIN_WIDTH
        if len(records) == 1:
            console.print(cell_summary(records[0], described=console.width >= DESCRIBED_WIDTH))
        else:
            console.print(sweep_summary(records))


def _is_recorded(path: Path) -> bool:
    return (path / "run.json").is_file()


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
    table = _table("class", "questions", "accuracy, %")
    if reference:
        table.add_column("FP, %", justify="right", no_wrap=True)
        table.add_column("difference, points", justify="right", no_wrap=True)
    for name in CLASSES:
        cells = [f"{rows[name]['n']:,}", _accuracy(rows[name])]
        if reference:
            cells += [number(full[name]["accuracy"]), _difference(record, reference, name)]
        title = f"{name:<5} {WHAT[name]}" if described else name
        if name == "Avg":
            table.add_section()
        table.add_row(title, *cells, style="bold" if name == "Avg" else "")
    title = " ".join(dict.fromkeys([record.method, record.bits]))
    lines = [Text.assemble((f"{record.model}, {title}", "bold"), f" on {_questions(record)}")]
    if not record.bit_widths.is_full_precision and reference is None:
        lines.append(Text("What it cost is not known. method=fp measures full precision."))
    facts = Table.grid(padding=(0, 2))
    facts.add_row("unparsable", f"{number(rows['Avg']['unparsable'])} %")
    facts.add_row("bits", _proof(record))
    facts.add_row("seconds", _stages(record))
    facts.add_row("record", Text(str(record.path), overflow="fold"))
    facts.add_row("report", _report([record]))
    return Group(Text(), *lines, table, facts)


def _measures_summary(record: Record) -> RenderableType:
    """Returns the measures on plain text or tasks, the proof of bits, and the folder."""
    table = _text_measures(record) if record.kind == "text" else _task_scores(record)
    title = " ".join(dict.fromkeys([record.method, record.bits]))
    head = Text.assemble((f"{record.model}, {title}", "bold"), f" on {_questions(record)}")
    facts = Table.grid(padding=(0, 2))
    facts.add_row("bits", _proof(record))
    facts.add_row("seconds", _stages(record))
    facts.add_row("record", Text(str(record.path), overflow="fold"))
    return Group(Text(), head, table, facts)


def _text_measures(record: Record) -> Table:
    table = _table("measure", "value", "95 % interval")
    for name, unit in TEXT_MEASURES.items():
        measure = record.metrics["text"][name]
        if measure is not None:
            low, high = measure["low"], measure["high"]
            reach = NONE if low is None else f"{low:.3f} to {high:.3f}"
            table.add_row(unit, f"{measure['value']:.3f}", reach)
    return table


def _task_scores(record: Record) -> Table:
    table = _table("task", "metric", "questions", "value", "standard error", left=2)
    tasks = record.metrics["tasks"]
    for task, metric, value, error in _scores(record):
        asked = tasks["n-samples"].get(task)  # of a group there is none
        count = f"{asked['effective']:,}" if asked else ""
        table.add_row(task, metric, count, f"{value:.4g}", "" if error is None else f"{error:.2g}")
    return table


def sweep_summary(records: Sequence[Record]) -> RenderableType:
    """Returns a table for each model and data set, one row for each cell."""
    groups: defaultdict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.model, _questions(record)].append(record)
    parts: list[RenderableType] = []
    for (model, questions), cells in groups.items():
        cells.sort(key=lambda cell: (*bits_order(cell.bit_widths), *method_order(cell.method)))
        proven = {row["layer"]: cell.name for cell in cells for row in cell.layers}
        faults = {cell.name: reason for cell in cells if (reason := fault(cell, proven))}
        parts += [Text(), Text.assemble((model, "bold"), f" on {questions}")]
        parts.append(_comparison(cells, faults))
        parts += [
            _refused(f"{cell.method} {cell.bits}", faults[cell.name])
            for cell in cells
            if cell.name in faults
        ]
    folders = dict.fromkeys(str(record.path.parent) for record in records)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("records", Text(", ".join(folders), overflow="fold"))
    facts.add_row("report", _report(records))
    return Group(*parts, facts)


def _comparison(records: Sequence[Record], faults: Mapping[str, str]) -> Table:
    """Returns the table of one model's cells: numbers, proofs, and the options that differ.

    Args:
        records: Records of the cells, in order.
        faults: Reason why tables refuse a record, by the name of each that they refuse.
    """
    options = _varying(records)
    named = [name.replace(".", ".\n") for name in options]
    table = _table("method", "bits", *named, left=2 + len(options))
    kind = records[0].kind
    for column in (*_measures(records[0]), "time, s"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("bits proven", justify="right")
    for record in records:
        same = record.bit_widths.is_full_precision
        if kind == "tasks":
            numbers = [f"{value:.4g}" for _, _, value, _ in _scores(record)]
        elif kind == "text":
            numbers = [_text_number(record, "kl"), _text_number(record, "perplexity")]
        else:
            reference = None if same else find_reference(record, records)
            numbers = [_accuracy(record.metrics["classes"]["Avg"])]
            numbers.append("" if same else _difference(record, reference, "Avg"))
        table.add_row(
            record.method,
            "" if same else record.bits,
            *(values.get(record.name, "") for values in options.values()),
            *numbers,
            f"{_seconds(record):.1f}",
            Text("NO", "bold red") if record.name in faults else "" if same else "yes",
        )
    return table


def _measures(record: Record) -> list[str]:
    """Returns the headings of what the cells of a sweep are compared by."""
    if record.kind == "tasks":
        return [f"{task},\n{metric}" for task, metric, _, _ in _scores(record)]
    if record.kind == "text":
        return ["KL, nats", "perplexity"]
    return ["accuracy, %", "against FP, points"]


def _scores(record: Record) -> list[Score]:
    return list(scores(record.metrics["tasks"]["results"]))


def _text_number(record: Record, name: str) -> str:
    measure = record.metrics["text"][name]
    return NONE if measure is None else f"{measure['value']:.3f}"


def find_reference(record: Record, among: Iterable[Record] = ()) -> Record | None:
    """Finds the newest record in full precision of the same model, questions and seed.

    Args:
        record: Record of a quantized cell, or of any other.
        among: Records that are looked at first; then those in the folder of `record`.
    """
    if record.bit_widths.is_full_precision:
        return None
    here = [other for other in among if _is_reference(other.run, record)]
    if here:
        return max(here, key=lambda other: other.run["finished"])
    found = []
    for folder in record.path.parent.glob(f"{record.model}-fp-fp-*"):
        try:
            if _is_reference(run := read_run(folder), record):
                found.append((run["finished"], Record.load(folder)))
        except (OSError, ValueError, KeyError, TypeError, RunError):
            continue  # a damaged record is told when a table needs it
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _is_reference(run: Mapping[str, Any], record: Record) -> bool:
    own, other = record.run["influences"], run["influences"]
    return (
        other["bits"]["weights"] is None
        and all(own.get(part) == other[part] for part in ("model", "data", "evaluation", "seed"))
        and run["files_hashed"] == record.run["files_hashed"]
    )


def _difference(record: Record, reference: Record | None, name: str) -> str:
    """Returns what quantization changed in a class, with its paired interval."""
    if reference is None:
        return "not recorded"
    if record.metrics["classes"][name]["n"] == 0:
        return NONE
    change = drop(_of_class(record, name), _of_class(reference, name))
    return f"{signed(change.difference)} ({paired_interval(change)})" if change else NONE


def _of_class(record: Record, name: str) -> Record:
    answers = record.predictions[CLASSES[name](record.predictions)]
    return Record(record.path, record.config, record.run, record.metrics, answers, record.layers)


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


def _proof(record: Record) -> Text:
    """Says whether the layers of a record prove its bits."""
    if (reason := fault(record, {})) is not None:
        return _refused("not proven", reason)
    if record.bit_widths.is_full_precision:
        return Text("nothing is quantized")
    weights = max(row["weight_levels"] for row in record.layers)
    inputs = max(row["input_levels"] for row in record.layers)
    values = f"at most {weights} weight and {inputs} input values per scale"
    return Text(f"proven in {len(record.layers)} layers: {values}", "green")


def _refused(what: str, reason: str) -> Text:
    return Text(f"{what}: tables refuse this record. {reason}", "bold red")


def _report(records: Sequence[Record]) -> Text:
    """Says where the report of the records is, or how to make it."""
    results = {record.path.parent.parent: None for record in records}
    pages = [folder / "report" / "index.html" for folder in results]
    where = [
        str(page) if page.is_file() else f"{program()} report --results={folder}"
        for page, folder in zip(pages, results, strict=True)
    ]
    return Text(", ".join(where), overflow="fold")


def _questions(record: Record) -> str:
    if record.kind == "tasks":
        return f"tasks {', '.join(record.config['tasks']['names'])}"
    data = record.config["data"]
    kind = "documents" if record.kind == "text" else "questions"
    return f"{len(record.predictions):,} {kind} of {data['name']}, split {data['split']}"


def _stages(record: Record) -> str:
    parts = [f"{name} {stage['seconds']:.1f}" for name, stage in record.run["stages"].items()]
    return ", ".join(parts)


def _seconds(record: Record) -> float:
    return sum(stage["seconds"] for stage in record.run["stages"].values())


def _accuracy(row: dict[str, Any]) -> str:
    """Returns the accuracy of a class and its interval."""
    return f"{number(row['accuracy'])} ({interval(row)})" if row["n"] else NONE


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    return table

"""Table 2 in Markdown: what was measured, what it cost, whether methods differ, how it was made.

The same records give the same bytes: no date, no path of this machine. A line of the paper is
always a row of its own that begins with "paper" and is set in italics.
"""

from collections.abc import Callable, Sequence
from typing import Any

from qvlm.evaluation.metrics import CLASSES, PairedDifference
from qvlm.markdown import bullets, table
from qvlm.records.record import Record
from qvlm.tables.comparison import Comparison, compare, drop
from qvlm.tables.published import average_gaps, label, published, rows, table2_values
from qvlm.tables.selection import FP, LeftOut, Selection, bits_order

NONE = "-"

HEAD = """\
# Table 2: accuracy in percent

NAT, SOC and LAN are the subjects natural, social and language science; TXT questions have a text as
context, IMG questions an image, NO questions neither; G1-6 and G7-12 are school grades; Avg is all
questions. Answers are generated; one that names no choice counts as {unparsable}. `WxAy` means
weights of x and activations of y bits. Intervals are Wilson's.

Rows that begin with *paper* are what the paper prints for another, larger model on other questions,
the one that ours stands for. They are there to compare the order of the methods and the size of
their drops, not the values."""


def render(selection: Selection, command: str) -> str:
    """Writes the whole page.

    Args:
        selection: what to show.
        command: what regenerates the page.
    """
    rules = sorted({record.metrics.get("unparsable_rule", "wrong") for record in selection.shown})
    words = {"wrong": "wrong", "random": "a random choice"}
    counted = " or ".join(words.get(rule, rule) for rule in rules) or "wrong"
    parts = [HEAD.format(unparsable=counted)]
    for model, widths in selection.by_cell().items():
        parts += _model(model, widths)
    parts += ["## Refused rows", left_out(selection.refused, REFUSED, "None.")]
    if selection.set_aside:
        parts += ["## Records not shown", left_out(selection.set_aside, "", "None.")]
    parts += _paper(selection.shown)
    parts += ["## How this was made", made_by(selection.shown, command)]
    return "\n\n".join(parts) + "\n"


REFUSED = (
    "These cells were run, but what was seen in their layers does not prove the bits they claim, "
    "or their numbers are broken."
)


def _model(model: str, widths: dict[str, list[Record]]) -> list[str]:
    records = [record for cell in widths.values() for record in cell]
    reference = next(iter(widths.get(FP, [])), None)
    paper = paper_model(records[0])
    role = f", which stands for {label(paper)}" if paper else ""
    parts = [f"## {model}{role}"]
    if reference is None:
        parts.append(
            f"**{model} has no full-precision record**: how far its rows drop is not known."
        )
    quantized = [bits for bits in sorted(widths, key=bits_order) if bits != FP]
    for bits in quantized or [FP]:
        rows = widths[bits]
        shown = [reference, *rows] if reference is not None and quantized else rows
        parts += [f"### {model}, {bits}", _accuracy(shown, reference)]
        if bits == FP:
            continue
        parts += [f"Cost and proof, {model} at {bits}:", _cost(rows)]
        made, impossible = compare(rows)
        parts += [f"Paired tests, {model} at {bits}:", paired_tests(made, impossible)]
    return parts


def _accuracy(records: Sequence[Record], reference: Record | None) -> str:
    counts = [_word(records[0].metrics["classes"][name]["n"]) for name in CLASSES]
    rows = [["", "questions", *counts, ""]]
    for record in records:
        classes = record.metrics["classes"]
        measured = [number(classes[name]["accuracy"]) for name in CLASSES]
        bounds = [
            NONE if not row["n"] else f"{row['ci_low']:.1f}-{row['ci_high']:.1f}"
            for row in (classes[name] for name in CLASSES)
        ]
        difference = None if record is reference else drop(record, reference)
        points = signed(difference.difference) if difference else ""
        rows.append([f"**{record.method}**", "measured", *measured, points])
        interval = paired_interval(difference) if difference else ""
        rows.append(["", "95 % interval", *bounds, interval])
        rows += _paper_row(record)
    return table(["method", "", *CLASSES, "Avg against FP"], rows, left=2)


def _paper_row(record: Record) -> list[list[str]]:
    paper = paper_model(record)
    values = table2_values(paper) if paper else {}
    own = values.get((record.bits, record.method))
    if paper is None or own is None:
        return []
    cells = [f"*{own[name]:.2f}*" if name in own else "" for name in CLASSES]
    full = values[FP, FP]["Avg"]
    change = "" if record.bits == FP else f"*{signed(own['Avg'] - full)}*"
    return [["", f"*paper, {label(paper)}*", *cells, change]]


def _cost(records: Sequence[Record]) -> str:
    columns: dict[str, Callable[[Record], str]] = {
        "method": lambda r: r.method,
        "unparsable, %": lambda r: number(r.metrics["classes"]["Avg"]["unparsable"]),
        "search, s": lambda r: f"{r.run['report']['search_seconds']:.1f}",
        "candidates": lambda r: _word(r.run["report"]["candidates"]),
        "quantize, s": lambda r: f"{r.run['stages']['quantize']['seconds']:.1f}",
        "peak, MiB": _peak,
        "layers": lambda r: _word(len(r.layers)),
        "levels": _levels,
        "probed": lambda r: _word(sum(bool(row.get("probed")) for row in r.layers)),
        "uncalibrated": lambda r: _word(len(r.run.get("uncalibrated", []))),
    }
    return table(list(columns), [[cell(record) for cell in columns.values()] for record in records])


def paired_tests(made: Sequence[Comparison], impossible: Sequence[str]) -> str:
    parts = []
    if made:
        header = ["comparison", "difference, points", "95 % interval", "only the first right"]
        header += ["only the second right", "p, exact McNemar", "p, Holm", "verdict"]
        rows = [
            [
                f"{c.first} - {c.second}",
                signed(c.difference.difference),
                paired_interval(c.difference),
                _word(c.test.only_a),
                _word(c.test.only_b),
                _p(c.test.p_value),
                _p(c.p_holm),
                c.verdict,
            ]
            for c in made
        ]
        parts.append(table(header, rows))
    if impossible:
        parts.append(bullets([f"Not tested: {sentence}." for sentence in impossible]))
    return "\n\n".join(parts) or "There are no two methods to compare."


def left_out(left: Sequence[LeftOut], introduction: str, nothing: str) -> str:
    if not left:
        return nothing
    sentences = [
        f"{entry.record.model} {entry.record.bits} {entry.record.method} "
        f"(`{entry.record.name}`): {entry.reason}"
        for entry in left
    ]
    return "\n\n".join(part for part in (introduction, bullets(sentences)) if part)


_GAP = "Avg is {printed:.2f}, its subjects weighted by their questions give {computed:.2f}"
_VARIANT = "{column} is {printed:.2f} in one copy of the paper and {other_copy:.2f} in another"


def _paper(records: Sequence[Record]) -> list[str]:
    """What does not add up in the printed numbers that are shown here."""
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


def made_by(records: Sequence[Record], command: str) -> str:
    lines = [f"Command: `{command}`"]
    if not records:
        return bullets(lines)

    def each(name: str, value: Callable[[Record], str]) -> None:
        values = list(dict.fromkeys(map(value, records)))
        lines.append(f"{name}: {'; or '.join(values)}")

    each("Hardware", _hardware)
    each("Versions", lambda r: ", ".join(f"{k} {v}" for k, v in r.run["versions"].items()))
    each("Code", _revision)
    each("Seed", lambda r: str(r.run["seed"]))
    each("Questions", lambda r: f"{len(r.predictions)} of {_data(r)}")
    quantized = [record for record in records if record.bits != FP]
    if quantized:
        records = quantized
        each("Calibration", _calibration)
        each("Quantizer", lambda r: _settings(r.config["quantizer"]))
    lines.append(
        "Tests: exact McNemar on the same questions, p corrected by Holm over the comparisons of "
        "one model and bit width, verdict at 5 %; paired intervals by Bonett and Price, those of "
        "one model and bit width together at 95 % (Bonferroni), those against FP each"
    )
    lines.append(
        "Levels: most distinct weights / inputs per scale that entered any layer's product; a "
        "probed layer was reached by no question and was run on random inputs; an uncalibrated one "
        "saw no calibration token"
    )
    return bullets([f"{line}." if not line.endswith("`") else line for line in lines])


def paper_model(record: Record) -> str | None:
    """The paper's model that a record's model stands for, if any."""
    return record.config["model"].get("stands_for")


def _hardware(record: Record) -> str:
    hardware = record.run["hardware"]
    used = [f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gib']:g} GiB"]
    if record.run["device"] != "cpu":
        used.append(f"{hardware['gpu']}")
    threads = record.run.get("threads")
    return ", ".join(used) + (f", {threads} threads" if threads else "")


def _revision(record: Record) -> str:
    git = record.run["git"]
    if git["revision"] is None:
        return "not in a git repository"
    return f"revision {git['revision'][:12]}" + (", with local changes" if git["dirty"] else "")


def _data(record: Record) -> str:
    data = record.config["data"]
    return f"{data['name']}, split {data['split']}, seed {data['seed']}"


def _calibration(record: Record) -> str:
    calibration = record.run["calibration"]
    return f"{len(calibration['ids'])} problems of split {calibration['split']}"


def _settings(nested: dict[str, Any]) -> str:
    parts = []
    for key, value in nested.items():
        if isinstance(value, dict):
            parts.append(f"{key} {' '.join(str(inner) for inner in value.values())}")
        else:
            parts.append(f"{key} {value}")
    return ", ".join(parts)


def _peak(record: Record) -> str:
    return f"{max(stage['peak_mib'] for stage in record.run['stages'].values()):.0f}"


def _levels(record: Record) -> str:
    weights = max(row["weight_levels"] for row in record.layers)
    inputs = max(row["input_levels"] for row in record.layers)
    return f"{weights} / {inputs}"


def paired_interval(difference: PairedDifference) -> str:
    return f"{signed(difference.low, 1)} to {signed(difference.high, 1)}"


def signed(value: float, digits: int = 2) -> str:
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{'-' if value < 0 else '+'}{text}"


def number(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _word(value: object) -> str:
    return str(value)


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 1e-4 else f"{value:.0e}"

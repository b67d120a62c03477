"""Fills the template: the report is one HTML file that holds its style, its script and its data."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from qvlm.evaluation.metrics import CLASSES
from qvlm.records.record import Record
from qvlm.report import charts, losses, proof, questions, tables, verdicts
from qvlm.report import costs as cost
from qvlm.report.charts import Point
from qvlm.report.content import Content, provenance
from qvlm.report.sensitivity import SERIES, sensitivities
from qvlm.tables.labels import FP
from qvlm.tables.report import interval, with_interval
from qvlm.tables.selection import execution

ASSETS = Path(__file__).resolve().parent / "assets"
KL = "KL divergence from full precision, nats per answer token"
SECTIONS = {
    "verdicts": "Verdicts",
    "tables": "Tables",
    "charts": "Classes",
    "bits": "Bits",
    "kl": "KL",
    "cost": "Memory and speed",
    "losses": "Losses",
    "proof": "Proof",
    "questions": "Questions",
    "runs": "Runs",
}


def page(
    records: Sequence[Record],
    made_with: str,
    table4: pd.DataFrame | None = None,
    private: bool = False,
    sensitivity: pd.DataFrame | None = None,
) -> str:
    """Returns the report.

    Args:
        records: Records of a folder.
        made_with: Command that makes the page again.
        table4: Rows of Table 4's CSV, or None.
        private: Whether the page stays on this machine and may hold the texts of any data set.
        sensitivity: Rows of the CSV of `qvlm sensitivity`, or None.

    Raises:
        UserError: If the questions cannot be read again.
    """
    content = Content.of(records)
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    grids = [*tables.accuracy(content), *tables.parts(content), *tables.texts(content)]
    if table4 is not None:
        caption = "Table 4: time and memory of packed models, as make table4 measured them."
        grids.append(tables.from_frame(caption, table4, {}))
    every = content.every
    several = len({record.model for record in every}) > 1
    refused = [record for record, _ in content.refused]
    names = [f"{r.model} {_label(r)}" if several else _label(r) for r in every]
    environment.filters["name_of"] = names.__getitem__
    text: str = environment.get_template("page.html").render(
        style=Markup((ASSETS / "style.css").read_text(encoding="utf-8")),
        script=Markup((ASSETS / "report.js").read_text(encoding="utf-8")),
        content=content,
        made_with=made_with,
        private=private,
        claims=verdicts.claims(content),
        costs=verdicts.costs(content),
        grids=grids,
        by_class=_by_class(content),
        by_bits=_by_bits(content),
        by_kl=_by_kl(content),
        by_cost=_by_cost(content, table4),
        losses=_losses(content),
        series=SERIES.values(),
        sensitivities=sensitivities(sensitivity),
        strips=[
            proof.strip(r, content.numbers[r.name], f"{r.model}, {_label(r)}")
            for r in [*content.records, *content.texts, *refused]
            if r.layers
        ],
        asked=questions.asked(content, private),
        rule=questions.RULE.format(least=questions.LEAST, per_method=questions.PER_METHOD),
        classes=[name for name in CLASSES if name != "Avg"],
        provenance=[provenance(record) for record in every],
        records=every,
        names=names,
        sections=list(SECTIONS.items()),
        FP=FP,
    )
    return text


def _label(record: Record) -> str:
    if record.method == FP:
        return FP
    packed = " packed" if execution(record) == "packed" else ""
    return f"{record.method} {record.bits}{packed}"


def _by_class(content: Content) -> list[tuple[str, Markup, list[str]]]:
    """Returns per model and bit widths a chart of accuracy by class, and the methods it shows."""
    found = []
    for model, cells in content.whole.by_cell().items():
        full = [r for bits, own in cells.items() if bits.is_full_precision for r in own]
        for bits, own in cells.items():
            if bits.is_full_precision and len(cells) > 1:
                continue
            shown = own if bits.is_full_precision else [*full, *own]
            title = f"{model}, {bits.label}"
            found.append((title, _dots(title, shown, content), [r.method for r in shown]))
    return found


def _dots(title: str, records: Sequence[Record], content: Content) -> Markup:
    names = [n for n in CLASSES if all(r.metrics["classes"][n]["n"] for r in records)]
    points = []
    for band, name in enumerate(names):
        for place, record in enumerate(records):
            row = record.metrics["classes"][name]
            about = f"{name}: {_label(record)} {row['accuracy']:.2f} %, 95 % {interval(row)}"
            y = band + (place + 1) / (len(records) + 1)
            run = content.numbers[record.name]
            mark = content.marks[record.method]
            ends = row["ci_low"], row["ci_high"]
            points.append(Point(row["accuracy"], y, about, mark, (run,), *ends))
    reached = [value for point in points for value in (point.low or 0.0, point.high or 0.0)]
    x = charts.linear_axis(reached, "accuracy, %", most=100)
    height = len(names) * max(34, 13 * (len(records) + 1))
    return charts.chart(
        f"Accuracy by class, {title}", x, charts.bands(names), points, (), height, sideways=True
    )


def _by_bits(content: Content) -> list[tuple[str, Markup, list[str]]]:
    """Returns per model a chart of accuracy against bit widths, and the methods it shows."""
    found = []
    for model, cells in content.whole.by_cell().items():
        labels = [bits.label for bits in cells]
        if len(labels) < 2:
            continue
        records = [record for own in cells.values() for record in own]
        methods = list(dict.fromkeys(record.method for record in records))
        lines: defaultdict[str, list[Point]] = defaultdict(list)
        for record in records:
            row = record.metrics["classes"]["Avg"]
            about = f"{_label(record)}: {row['accuracy']:.2f} %, 95 % {interval(row)}"
            dodge = 0.5 if record.method == FP else 0.2 + 0.6 * _share(methods, record.method)
            run = content.numbers[record.name]
            mark = content.marks[record.method]
            x = labels.index(record.bits) + dodge
            ends = row["ci_low"], row["ci_high"]
            lines[record.method].append(Point(x, row["accuracy"], about, mark, (run,), *ends))
        points = [point for line in lines.values() for point in line]
        ends_ = [value for point in points for value in (point.low or 0.0, point.high or 0.0)]
        y = charts.linear_axis(ends_, "accuracy, %", most=100)
        name = f"Accuracy against bit widths, {model}"
        shown = charts.chart(name, charts.columns(labels), y, points, list(lines.values()))
        found.append((model, shown, methods))
    return found


def _by_kl(content: Content) -> list[tuple[str, Markup, list[str]]]:
    """Returns per model a chart of the divergence from full precision, and the methods it shows."""
    found = []
    for model, cells in content.whole.by_cell().items():
        measured = {
            bits.label: own
            for bits, records in cells.items()
            if (own := [r for r in records if (r.metrics.get("kl") or {}).get("mean", 0) > 0])
        }
        points = []
        for band, records in enumerate(measured.values()):
            for place, record in enumerate(records):
                kl = record.metrics["kl"]
                value, ends = with_interval(kl)
                about = f"{_label(record)}: {value} nats per answer token, 95 % {ends}"
                half = 1.96 * (kl["standard_error"] or 0.0)  # a single problem has none
                y = band + (place + 1) / (len(records) + 1)
                mark, run = content.marks[record.method], content.numbers[record.name]
                low = max(kl["mean"] - half, kl["mean"] / 10)
                point = Point(kl["mean"], y, about, mark, (run,), low, kl["mean"] + half)
                points.append(point)
        if not points:
            continue
        x = charts.log_axis([p.low or p.x for p in points] + [p.high or p.x for p in points], KL)
        rows = max(len(records) for records in measured.values()) + 1
        height = len(measured) * max(34, 14 * rows)
        name = f"Divergence from full precision, {model}"
        chart = charts.chart(name, x, charts.bands(list(measured)), points, (), height, True)
        methods = [r.method for records in measured.values() for r in records]
        found.append((model, chart, list(dict.fromkeys(methods))))
    return found


def _share(names: Sequence[str], name: str) -> float:
    return (names.index(name) + 0.5) / len(names)


def _by_cost(
    content: Content, table4: pd.DataFrame | None
) -> list[tuple[str, Markup, Markup, list[str]]]:
    """Returns per model accuracy against memory and against speed, and the methods shown."""
    found = []
    for model, own in cost.by_model(cost.costs(content, table4)).items():
        if len(own) < 2:
            continue
        y = charts.linear_axis([c.accuracy for c in own], "accuracy, %", most=100)
        pair = []
        for what, unit in (("mib", "MiB of weights"), ("speed", "questions per second")):
            values = [getattr(c, what) for c in own]
            points = [
                Point(
                    getattr(c, what),
                    c.accuracy,
                    f"{c.method} {c.bits}: {getattr(c, what):.3g} {unit}, {c.accuracy:.2f} %",
                    content.marks.get(c.method, 1),
                    c.runs,
                    tag=c.bits,
                )
                for c in own
            ]
            x = charts.log_axis(values, unit)
            pair.append(charts.chart(f"Accuracy against {unit}, {model}", x, y, points))
        found.append((model, pair[0], pair[1], list(dict.fromkeys(c.method for c in own))))
    return found


def _losses(content: Content) -> list[tuple[str, Markup | None, dict[str, float], str]]:
    """Returns per quantized record its errors by layer as a chart, and by kind of linear."""
    found: list[tuple[str, Markup | None, dict[str, float], str]] = []
    for record in content.whole.shown:
        if record.bit_widths.is_full_precision:
            continue
        title = f"{record.model}, {_label(record)}"
        loss = losses.losses(record)
        if loss is None:
            found.append((title, None, {}, record.name))
            continue
        names = [losses.short_name(layer) for layer in loss.layers]
        run = content.numbers[record.name]
        points = [
            Point(
                i + 0.5, error, f"{layer}: error {error:.3g}", content.marks[record.method], (run,)
            )
            for i, (layer, error) in enumerate(loss.layers.items())
            if error > 0
        ]
        y = charts.log_axis([point.y for point in points], "squared error of the output")
        x = charts.columns(_thinned(names), "layers of the vision tower (V) and language model (L)")
        shown = charts.chart(f"Error by layer, {title}", x, y, points, [points], 200)
        found.append((title, shown, loss.kinds, record.name))
    return found


def _thinned(names: Sequence[str], most: int = 12) -> list[str]:
    """Returns the names with some left empty, so that at most `most` are printed."""
    step = -(-len(names) // most)
    return [name if i % step == 0 else "" for i, name in enumerate(names)]

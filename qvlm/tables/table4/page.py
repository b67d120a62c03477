"""The Markdown page of Table 4 on the miniatures."""

from collections.abc import Mapping, Sequence

import pandas as pd

from qvlm.data.sizes import PUBLISHED_QUESTIONS
from qvlm.markdown import bullets, table
from qvlm.planning.footprint import GIB
from qvlm.records.record import Record
from qvlm.runtime.stages import MIB
from qvlm.tables.cost import COLUMNS, median_and_range
from qvlm.tables.table4.facts import NOT_PACKED, Facts, Measured, rows_of

HEAD = """\
# Table 4: what packed models cost

In packed execution the codes themselves are multiplied, and no floating-point copy of the weights
is kept. {questions} questions are asked one at a time, of all models of a kind in turn, in
{repeats} repeats. Seconds are medians. The speed-up is that within a repeat, as median (lowest to
highest), and above 1 is faster than full precision. Full precision is bfloat16. *hours* is the time
of {test:,} questions at this speed. Peak memory is that of a fresh process. The last column is what
its libraries take without a model. At this size they are nearly all of the peak, so compare the
weights. Accuracy is in percent, on all questions of the test split, in float64 but for the codes.
*as simulated* is the share of questions with the answer of the same cell in simulated execution,
where such a cell was recorded.

Rows that begin with *paper* are what the paper prints for a larger model on a GPU."""

QUANTIZATION = """\
## What it took to make them

Search is what the method looked for, quantization all of it. Both were measured when the cell was
computed, on that machine and beside whatever else it did."""

_HEADER = (
    *("bits", "method", "s/question", "vision", "prefill", "decoding", "tokens/s", "hours"),
    *("speed-up", "weights MiB", "smaller", "peak GiB", "accuracy"),
    *(*(f"as {other}" for other in NOT_PACKED), "without model GiB"),
)


def texts_of(facts: Facts, records: Mapping[str, Record], command: str) -> dict[str, str]:
    """Returns the texts of the table's two files by their names.

    Args:
        facts: What was measured.
        records: Records that the facts name, by name.
        command: Command that the page names.
    """
    measured = rows_of(facts, records)
    frame = pd.DataFrame([row.columns for row in measured]).reindex(columns=list(COLUMNS))
    csv = frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    return {"table4.csv": csv, "table4.md": page(measured, facts, command)}


def page(rows: Sequence[Measured], facts: Facts, command: str) -> str:
    """Returns the page.

    Args:
        rows: Rows of the facts.
        facts: What was measured.
        command: Command that regenerates the page.
    """
    head = HEAD.format(questions=facts.questions, repeats=facts.repeats, test=PUBLISHED_QUESTIONS)
    parts = [head]
    for model in dict.fromkeys(row.record.model for row in rows):
        own = [row for row in rows if row.record.model == model]
        parts += [f"## {model}", _costs(own)]
    for other in NOT_PACKED:
        parts += _disagreements(rows, other)
    parts += [QUANTIZATION, _quantization(rows), _notes(rows, facts, command)]
    return "\n\n".join(parts) + "\n"


def _costs(rows: Sequence[Measured]) -> str:
    """Returns one model's table, with the paper's row below each of ours."""
    lines = []
    for row in rows:
        columns = row.columns
        lines.append(
            [
                *(columns["bits"], columns["method"], f"{columns['seconds_per_question']:.4f}"),
                *(f"{columns[part + '_s']:.4f}" for part in ("vision", "prefill", "decode")),
                f"{columns['tokens_per_s']:.0f}",
                f"{columns['seconds_per_question'] * PUBLISHED_QUESTIONS / 3600:.3f}",
                median_and_range(row.ratios),
                f"{row.alone.weights / MIB:.2f}",
                f"{row.weight_ratio:.2f}x",
                f"{columns['peak_memory_gib']:.3f}",
                f"{columns['accuracy']:.2f}",
                *(_agreement(row, other) for other in NOT_PACKED),
                f"{row.alone.before / GIB:.3f}",
            ]
        )
        if "paper_model" in columns:
            printed = {
                "bits": columns["bits"],
                "method": f"paper, {columns['paper_model']}: {columns['method']}",
                "hours": f"{columns['paper_hours']:g}",
                "peak GiB": f"{columns['paper_memory_gib']:g}",
                "accuracy": f"{columns['paper_accuracy']:.2f}",
            }
            lines.append([printed.get(name, "") for name in _HEADER])
    return table(_HEADER, lines, left=2)


def _agreement(row: Measured, other: str) -> str:
    """Returns the share of questions with the answer of another execution, or "" if unknown."""
    if other not in row.disagreements:
        return ""
    questions = len(row.record.predictions)
    return f"{100 * (1 - len(row.disagreements[other]) / questions):.2f} %"


def _disagreements(rows: Sequence[Measured], other: str) -> list[str]:
    """Returns the section that names the questions which another execution answers differently."""
    differing = [
        f"{row.record.model}, {row.record.bits}, {row.record.method}: {', '.join(questions)}"
        for row in rows
        if (questions := row.disagreements.get(other))
    ]
    if not differing:
        return []
    return [f"## Questions that {other} execution answers differently", bullets(differing)]


def _quantization(rows: Sequence[Measured]) -> str:
    """Returns the table of what the quantization of each model took."""
    lines = []
    for row in rows:
        record = row.record
        if "quantize" not in record.run["stages"]:
            continue
        report, stage = record.run["report"], record.run["stages"]["quantize"]
        lines.append(
            [
                *(record.model, record.bits, record.method),
                f"{report['search_seconds']:.1f}",
                str(report["candidates"]),
                f"{stage['seconds']:.1f}",
                f"{stage['peak_mib']:.0f}",
            ]
        )
    header = ["model", "bits", "method", "search, s", "candidates", "quantization, s", "peak MiB"]
    return table(header, lines, left=3)


def _notes(rows: Sequence[Measured], facts: Facts, command: str) -> str:
    """Returns the list of how the page was made."""
    kernels = [
        f"{row.record.model} {row.record.bits} {row.record.method} "
        + ", ".join(f"{name} {calls}" for name, calls in sorted(row.alone.kernels.items()))
        for row in rows
        if row.alone.kernels
    ]
    questions = sorted({len(row.record.predictions) for row in rows})
    hardware, versions = facts.hardware, facts.versions
    gpu = f"; {hardware['gpu']}" if facts.device != "cpu" else "; GPU: not measured"
    return bullets(
        [
            f"Command: `{command}`",
            f"Calls of packed products for these questions: {'; '.join(kernels)}",
            f"Device: {facts.device}; {hardware['cpu']}, {facts.threads} threads, "
            f"{hardware['memory_gib']} GiB{gpu}",
            f"Questions behind each accuracy: {', '.join(map(str, questions))}",
            f"Versions: python {versions['python']}, torch {versions['torch']}, transformers "
            f"{versions['transformers']}",
            f"Revision: {facts.revision}",
        ]
    )

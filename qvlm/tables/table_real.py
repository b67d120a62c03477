"""Table "real": `python -m qvlm.tables.table_real`, methods and granularities on a real model.

The table is a pure function of the records whose data are plain text. Each combination of model,
granularity of the language model's activations, method and bit widths has a row, with the mean over
the draws of the calibration rows. A combination of the design (`GRANULARITIES`, `METHODS`, `BITS`)
without a record says "not measured".
"""

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import pandas as pd

from qvlm.markdown import bullets, table
from qvlm.records.record import Record
from qvlm.tables.command import run_pure
from qvlm.tables.granularity import FIRST_IN_FLOAT, GRANULARITIES, PER_TOKEN, activations
from qvlm.tables.labels import FP, bits_order, method_order
from qvlm.tables.proof import fault
from qvlm.tables.report import hardware, revision
from qvlm.tables.selection import one_setting, usual_parameters

NAME = "table_real"
NOT_MEASURED = "not measured"
METHODS = (
    *("RTN", "AWQ", "QLoRA", "Layer-wise", "Q-VLM, CDM only"),
    *("SmoothQuant", "GPTQ", "QuaRot", "RoCo"),
    *(f"{name}{PER_TOKEN}" for name in ("GPTQ", "QuaRot", "RoCo")),
)
BITS = ("W8A8", "W6A6", "W4A8", "W8A4", "W4A4")
MEASURES = ("perplexity", "kl", "agreement")

HEAD = """\
# A real language model on plain text

SmolLM2-135M is a LLaMA with massive activations, and with outlier channels where the miniatures
have none. Every token of {documents} documents ({tokens} tokens) is predicted. KL is that of the
next-token distribution to full precision, in nats per token. Each cell is **KL** and, in
parentheses, the perplexity, means over the draws of the calibration rows. In full precision the
perplexity is {perplexity} (95 % interval {interval}). Lower is better, and a KL of 0 is full
precision."""

ONCE = """\
The weights have been rounded once before: the file that the package index carries is of type Q4_1,
4 bits in groups of 32. Full precision here means these weights. So W4 rounds numbers a second time,
and what it costs is not what it costs with the original weights. W8A4 shows what 4-bit activations
cost, and W4A8 what 4-bit weights cost."""


@dataclass(frozen=True)
class Row:
    """What identifies a row of the table within one model and one set of texts.

    Attributes:
        activations: How the language model's activations are quantized, in words.
        method: Name of the method.
    """

    activations: str
    method: str


Cells = dict[Row, dict[str, list[Record]]]
"""Records of a model by row and bit widths, one per draw."""


def arrange(records: Sequence[Record]) -> tuple[list[Record], Cells, list[str]]:
    """Arranges the records of one model.

    Of several records of one row, bit widths and draw, the newest is kept.

    Returns:
        Records in full precision, the newest first; the others by row and bit widths; sentences on
        the records that are refused.
    """
    full: list[Record] = []
    cells: dict[Row, dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    usual, others = usual_parameters(records)
    kept, aside = one_setting(usual, ["quantizer", "calibration.seed"])
    others += aside
    by_words: dict[tuple[str, bool], list[Record]] = defaultdict(list)
    for record in kept:
        words = FP if record.bit_widths.is_full_precision else activations(record)
        # Such a method has these scales whatever the quantizer's option says.
        by_words[words, record.method.endswith(PER_TOKEN)].append(record)
    kept = []
    for own in by_words.values():
        alike, aside = one_setting(own, ["calibration.seed"])
        kept += alike
        others += aside
    refused = [f"`{left.record.name}`: {left.reason}" for left in others]
    for record in sorted(kept, key=lambda record: record.run["finished"]):
        if reason := fault(record, {}):
            refused.append(f"`{record.name}`: {reason}")
        elif record.bit_widths.is_full_precision:
            full.append(record)
        else:
            row = Row(activations(record), record.method)
            draw = record.run["influences"]["calibration"]["seed"]
            cells[row][record.bits][draw] = record
    found: Cells = {
        row: {bits: list(draws.values()) for bits, draws in by_bits.items()}
        for row, by_bits in cells.items()
    }
    return full[::-1], found, refused


def rows_of(cells: Cells) -> list[Row]:
    """Returns the rows of the design and those that were measured beside it, in order."""
    wanted = [Row(words, METHODS[0]) for words in GRANULARITIES.values()]
    wanted += [
        Row(GRANULARITIES["per_token" if method.endswith(PER_TOKEN) else "per_channel"], method)
        for method in METHODS[1:]
    ]
    order = [*GRANULARITIES.values()]

    def rank(row: Row) -> tuple[Any, ...]:
        words = row.activations.removesuffix(FIRST_IN_FLOAT)
        return method_order(row.method), order.index(words), row.activations

    return sorted(dict.fromkeys([*wanted, *cells]), key=rank)


def shown(records: Sequence[Record]) -> list[Record]:
    """Returns the records that the page shows, each model's one in full precision first."""
    found: list[Record] = []
    for model in sorted({record.model for record in records}):
        full, cells, _ = arrange([record for record in records if record.model == model])
        found += full[:1]
        found += [r for by_bits in cells.values() for draws in by_bits.values() for r in draws]
    return found


def mean(records: Sequence[Record], measure: str) -> float | None:
    """Returns the mean of a measure over draws, or None if one of them lacks it."""
    found = [record.metrics["text"][measure] for record in records]
    return None if None in found or not found else fmean(value["value"] for value in found)


def long(records: Sequence[Record]) -> pd.DataFrame:
    """Returns the rows of the CSV, one per record that the page shows and measure."""
    entries = []
    for record in sorted(shown(records), key=lambda r: (r.model, bits_order(r.bit_widths), r.name)):
        full = record.bit_widths.is_full_precision
        for measure in MEASURES:
            value = record.metrics["text"][measure] or dict.fromkeys(("value", "low", "high"))
            entries.append(
                {
                    "model": record.model,
                    "activations": FP if full else activations(record),
                    "method": record.method,
                    "bits": record.bits,
                    "draw": None if full else record.run["influences"]["calibration"]["seed"],
                    "measure": measure,
                    **value,
                    "tokens": record.metrics["text"]["tokens"],
                    "search_seconds": record.run["report"].get("search_seconds"),
                    "run": record.name,
                }
            )
    return pd.DataFrame(entries)


def page(records: Sequence[Record], command: str) -> str:
    """Returns the page.

    Args:
        records: Records whose data are plain text.
        command: Command that regenerates the page.
    """
    parts: list[str] = []
    refused: list[str] = []
    for model in sorted({record.model for record in records}):
        full, cells, bad = arrange([record for record in records if record.model == model])
        refused += bad
        text = next(r for r in [*shown(records), *records] if r.model == model).metrics["text"]
        found = full[0].metrics["text"]["perplexity"] if full else None
        parts.append(
            HEAD.format(
                documents=text["documents"],
                tokens=f"{text['tokens']:,}",
                perplexity=f"{found['value']:.2f}" if found else NOT_MEASURED,
                interval=_interval([found] if found else [], 2),
            )
        )
        parts += [ONCE] if model == "smollm2" else []
        parts += [_overview(cells), "## W4A4 in detail", _detail(cells, "W4A4")]
    parts.append("## Refused rows")
    parts.append(bullets(refused) if refused else "None.")
    parts += ["## How this was made", bullets(_made(shown(records), command))]
    return "\n\n".join(parts) + "\n"


def _overview(cells: Cells) -> str:
    lines = []
    for row in rows_of(cells):
        measured = [cells.get(row, {}).get(bits, []) for bits in BITS]
        lines.append([row.method, row.activations, *map(_cell, measured)])
    return table(["method", "activations", *BITS], lines, left=2)


def _cell(records: Sequence[Record]) -> str:
    kl, perplexity = mean(records, "kl"), mean(records, "perplexity")
    if perplexity is None:
        return NOT_MEASURED
    return f"**{NOT_MEASURED if kl is None else f'{kl:.3f}'}** ({perplexity:.1f})"


def _detail(cells: Cells, bits: str) -> str:
    header = ["method", "activations", "draws", "KL", "95 % interval", "from draw to draw"]
    header += ["perplexity", "same token, %", "search, s"]
    lines = []
    for row in rows_of(cells):
        records = cells.get(row, {}).get(bits, [])
        if not records or mean(records, "kl") is None:
            continue
        kls = [record.metrics["text"]["kl"] for record in records]
        values = [kl["value"] for kl in kls]
        seconds = fmean(record.run["report"]["search_seconds"] for record in records)
        lines.append(
            [
                row.method,
                row.activations,
                str(len(records)),
                f"{fmean(values):.3f}",
                _interval(kls, 3),
                f"{min(values):.3f} to {max(values):.3f}" if len(values) > 1 else NOT_MEASURED,
                f"{mean(records, 'perplexity'):.1f}",
                f"{mean(records, 'agreement'):.1f}",
                f"{seconds:.0f}",
            ]
        )
    return table(header, lines, left=2) if lines else f"Nothing is measured at {bits}."


def _interval(measures: Sequence[Mapping[str, float | None]], digits: int) -> str:
    """The mean interval of a measure over draws. A single document has none."""
    ends = [[measure[end] for measure in measures] for end in ("low", "high")]
    known = [[value for value in own if value is not None] for own in ends]
    if not measures or known != ends:
        return NOT_MEASURED
    return " to ".join(f"{fmean(own):.{digits}f}" for own in known)


def _made(records: Sequence[Record], command: str) -> list[str]:
    quantized = [record for record in records if not record.bit_widths.is_full_precision]
    calibrated = sorted(
        {
            f"{c['samples']} rows of {c['tokens']} tokens of split {c['split']}"
            for c in (record.config["calibration"] for record in quantized)
        }
    )
    return [
        f"Command: `{command}`",
        f"Records: {len(records)}.",
        f"Hardware: {'; or '.join(dict.fromkeys(map(hardware, records)))}.",
        f"Code: {'; or '.join(dict.fromkeys(map(revision, records)))}.",
        f"Calibration: {'; or '.join(calibrated) or NOT_MEASURED}.",
        "Texts: `qvlm/data/texts`, whose README names sources and licenses; split test.",
        "search, s: processor time of the search, so that what ran beside it does not count.",
        "Intervals take documents as clusters, which share their words and their subject. They do "
        "not hold the draw of the calibration rows, whose range stands beside them.",
    ]


def texts_of(records: Sequence[Record], command: str) -> Mapping[str, str]:
    """Returns the texts of the CSV and the page by the names of their files."""
    csv = long(records).to_csv(index=False, float_format="%.6g", lineterminator="\n")
    return {f"{NAME}.csv": csv, f"{NAME}.md": page(records, command)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    about = "Makes the table of a real language model from recorded runs."
    return run_pure(NAME, about, texts_of, list, arguments, kind="text")


if __name__ == "__main__":
    sys.exit(main())

"""Parts that several pages share: numbers, paired tests, records left out, how a page was made.

The same records give the same bytes: these parts hold no date and no path of this machine.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

from qvlm.evaluation.metrics import PairedDifference
from qvlm.markdown import bullets, table
from qvlm.records.record import Record
from qvlm.tables.comparison import Comparison
from qvlm.tables.selection import LeftOut, Selection

NONE = "-"  # cell of a table whose value does not exist
NOT_MEASURED = "not measured"  # cell of a table whose value this cell did not measure
NOT_RECORDED = "not recorded"  # cell of a table whose value older code did not record


def number(value: float | None) -> str:
    """Returns a value with two decimals."""
    return NONE if value is None else f"{value:.2f}"


def signed(value: float, digits: int = 2) -> str:
    """Returns a difference with its sign. A difference that rounds to zero has no sign."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{'-' if value < 0 else '+'}{text}"


def interval(row: dict[str, Any]) -> str:
    """Returns the interval of an accuracy.

    Args:
        row: Metrics of a class (see `class_metrics`).
    """
    return f"{row['ci_low']:.1f}-{row['ci_high']:.1f}" if row["n"] else NONE


def with_interval(row: Mapping[str, float | None], digits: int = 4) -> tuple[str, str]:
    """Returns a mean and its 95 % interval, which a single problem does not have.

    Args:
        row: `mean` and `standard_error`; see `Divergence.summary`.
        digits: Number of decimals.
    """
    mean, error = row["mean"], row["standard_error"]
    assert mean is not None
    if error is None:
        return f"{mean:.{digits}f}", NONE
    half = NormalDist().inv_cdf(0.975) * error
    return f"{mean:.{digits}f}", f"{max(0.0, mean - half):.{digits}f}-{mean + half:.{digits}f}"


def paired_interval(difference: PairedDifference) -> str:
    """Returns the interval of a difference."""
    return f"{signed(difference.low, 1)} to {signed(difference.high, 1)}"


def paired_tests(made: Sequence[Comparison], impossible: Sequence[str]) -> str:
    """Returns the table of comparisons, and the list of those that are not possible."""
    parts = []
    if made:
        header = ["comparison", "difference, points", "95 % interval", "only the first right"]
        header += ["only the second right", "p, exact McNemar", "p, Holm", "verdict"]
        rows = [
            [
                f"{c.first} - {c.second}",
                signed(c.difference.difference),
                paired_interval(c.difference),
                str(c.test.only_a),
                str(c.test.only_b),
                p_value(c.test.p_value),
                p_value(c.p_holm),
                c.verdict,
            ]
            for c in made
        ]
        parts.append(table(header, rows))
    if impossible:
        parts.append(bullets([f"Not tested: {sentence}." for sentence in impossible]))
    return "\n\n".join(parts) or "There are no two methods to compare."


def p_value(value: float) -> str:
    """Returns a p-value. One below what a float can hold is not 0."""
    if value < 1e-300:
        return "<1e-300"
    return f"{value:.4f}" if value >= 1e-4 else f"{value:.0e}"


_REFUSED = (
    "These cells were run, but their layers do not prove the bits that the cells claim, or their "
    "numbers are broken."
)


def left_out(selection: Selection) -> list[str]:
    """Returns the sections on records that are not shown."""
    parts = ["## Refused rows"]
    parts += [_REFUSED, _reasons(selection.refused)] if selection.refused else ["None."]
    if selection.set_aside:
        parts += ["## Records not shown", _reasons(selection.set_aside)]
    return parts


def _reasons(entries: Sequence[LeftOut]) -> str:
    return bullets(
        [
            f"{entry.record.model} {entry.record.bits} {entry.record.method} "
            f"(`{entry.record.name}`): {entry.reason}"
            for entry in entries
        ]
    )


_TESTS = (
    "Tests: exact McNemar on the same questions, p adjusted by Holm over the comparisons of one "
    "model and bit width, verdict at 5 %. Paired intervals are Bonett and Price's. Those of one "
    "model and bit width hold together at 95 % (Bonferroni), those against FP each."
)


def made_by(records: Sequence[Record], command: str, notes: Sequence[str] = ()) -> list[str]:
    """Returns the section on how a page was made.

    Args:
        records: Records that the page shows.
        command: Command that regenerates the page.
        notes: Sentences that explain the page's tests and columns, beside the one on tests.
    """
    lines = [f"Command: `{command}`"]

    def each(name: str, value: Callable[[Record], str], of: Sequence[Record]) -> None:
        if of:
            lines.append(f"{name}: {'; or '.join(dict.fromkeys(map(value, of)))}.")

    each("Hardware", hardware, records)
    each("Versions", lambda r: ", ".join(f"{k} {v}" for k, v in r.run["versions"].items()), records)
    each("Code", revision, records)
    each("Seed", lambda r: str(r.run["seed"]), records)
    each("Questions", lambda r: f"{len(r.predictions)} of {_data(r)}", records)
    quantized = [record for record in records if not record.bit_widths.is_full_precision]
    each("Calibration", _calibration, quantized)
    each("Quantizer", lambda r: _settings(r.config["quantizer"]), quantized)
    if records:
        lines += [_TESTS, *notes]
    return ["## How this was made", bullets(lines)]


def hardware(record: Record) -> str:
    """Names the machine of a record."""
    machine = record.run["hardware"]
    used = [f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:g} GiB"]
    if record.run["device"] != "cpu":
        used.append(f"{machine['gpu']}")
    threads = record.run.get("threads")
    return ", ".join(used) + (f", {threads} threads" if threads else "")


def revision(record: Record) -> str:
    """Returns the revision of the code that a record was made with."""
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

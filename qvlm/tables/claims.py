"""The paper's claims that a miniature can test, and what became of each.

`make claims` runs what is missing of Tables 1, 2 and 5 and of `experiment=draws`, and writes
`claims.md`. Two things can make a difference between methods: the questions, which the paired
interval of one run covers, and the draw of the calibration problems, which it does not. So where
methods differ in their search, the difference is shown for several draws as well, on the validation
split. A verdict is a rule applied to the intervals, not an opinion.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qvlm.errors import RunError, UserError
from qvlm.evaluation.metrics import paired_difference
from qvlm.markdown import bullets, table
from qvlm.records.environment import revision_in_words, surroundings
from qvlm.records.record import Record, find_records
from qvlm.tables.command import write_files
from qvlm.tables.comparison import paired
from qvlm.tables.published import published
from qvlm.tables.selection import CDM, ERROR_PROXY, QVLM, VEO, is_draw, is_ordinary, select

TOKEN = "ZeroQuant-V2, per token"


@dataclass(frozen=True)
class Claim:
    """The paper's first method is ahead of the second.

    Attributes:
        printed: where it says so: a table, a model, and what the two are called there; None for a
            control of ours.
    """

    text: str
    bits: str
    first: str
    second: str
    printed: tuple[str, str, str, str] | None = None

    @property
    def points(self) -> float | None:
        """By how much, as the paper prints it."""
        if self.printed is None:
            return None
        name, model, *methods = self.printed
        whole = published(name)
        own = whole[whole["model"] == model]
        if "bits" in whole:
            own, column = own[own["bits"] == self.bits], "Avg" if "Avg" in whole else "accuracy"
        else:
            column = f"{self.bits}_accuracy"
        values = own.set_index("proxy" if "proxy" in whole else "method")[column]
        return float(values[methods[0]] - values[methods[1]])


_13B, _7B = "LLaVA-13B, Table", "LLaVA-7B, Table"
_QLORA, _AWQ = (("table2", "llava_13b", QVLM, other) for other in ("QLoRA", "AWQ"))
_OTHERS = ("table2", "llava_13b", "QLoRA", "AWQ")
_PARTS = {part: ("table1", "llava_7b", f"QLoRA+{part}", "QLoRA") for part in ("CDM", "VEO")}
_PROXIES = ("table5", "llava_7b", "entropy", "quantization error")
_PER_TOKEN = ("table6", "llava_7b", QVLM, "ZeroQuant-V2")
CLAIMS = (
    Claim(f"Q-VLM beats QLoRA ({_13B} 2)", "W6A6", QVLM, "QLoRA", _QLORA),
    Claim(f"Q-VLM beats QLoRA ({_13B} 2)", "W4A4", QVLM, "QLoRA", _QLORA),
    Claim(f"Q-VLM beats AWQ ({_13B} 2)", "W6A6", QVLM, "AWQ", _AWQ),
    Claim(f"Q-VLM beats AWQ ({_13B} 2)", "W4A4", QVLM, "AWQ", _AWQ),
    Claim(f"QLoRA beats AWQ ({_13B} 2)", "W4A4", "QLoRA", "AWQ", _OTHERS),
    Claim(f"CDM helps ({_7B} 1)", "W4A4", CDM, "Layer-wise", _PARTS["CDM"]),
    Claim(f"VEO helps ({_7B} 1)", "W4A4", VEO, "Layer-wise", _PARTS["VEO"]),
    Claim(f"Entropy beats the error as proxy ({_7B} 5)", "W4A4", CDM, ERROR_PROXY, _PROXIES),
    Claim(f"Q-VLM beats per-token ranges ({_7B} 6)", "W4A4", QVLM, TOKEN, _PER_TOKEN),
    Claim("Layer-wise search helps (the control)", "W4A4", "Layer-wise", "RTN"),
    Claim("Q-VLM helps at all (the control)", "W4A4", QVLM, "RTN"),
)


def claims_table(records: Sequence[Record]) -> str:
    """A row per claim: the paired difference on each model, with intervals that hold together."""
    shown = {(r.model, r.bits, r.method): r for r in records}
    models = sorted({model for model, _, _ in shown})
    rows = []
    count = len(CLAIMS) * len(models)
    for claim in CLAIMS:
        cells, signs = [], []
        for model in models:
            both = [shown.get((model, claim.bits, name)) for name in (claim.first, claim.second)]
            answers = paired(both[0], both[1]) if both[0] and both[1] else None
            if answers is None:
                cells.append("not measured")
                continue
            found = paired_difference(*answers, count)
            cells.append(f"{found.difference:+.2f} ({found.low:+.1f} to {found.high:+.1f})")
            signs.append((found.low > 0) - (found.high < 0))
        printed = "" if claim.points is None else f"{claim.points:+.1f}"
        rows.append([claim.text, claim.bits, printed, *cells, verdict(signs, len(models))])
    return table(["claim", "bits", "paper", *models, "verdict"], rows, left=2)


def verdict(signs: Sequence[int], models: int) -> str:
    """In words: 1 is an interval above zero, -1 one below, 0 one that holds zero."""
    if len(signs) < models:
        return "not measured"
    ahead, behind = signs.count(1), signs.count(-1)
    if ahead and behind:
        return "depends on the model"
    if ahead or behind:
        where = "" if max(ahead, behind) == models else f" on {max(ahead, behind)} of {models}"
        return ("holds" if ahead else "the opposite") + where
    return "no difference seen"


def draws_table(records: Sequence[Record]) -> str:
    """Accuracy over calibration draws, and each method's difference to RTN within a draw."""
    by_model: defaultdict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    for record in records:
        seed = record.config["calibration"]["seed"]
        by_model[record.model][record.method, seed] = record.metrics["classes"]["Avg"]["accuracy"]
    rows = []
    for model, cells in sorted(by_model.items()):
        methods = [m for m in ("RTN", "Layer-wise", CDM, QVLM) if any(k[0] == m for k in cells)]
        for method in methods:
            found = {seed: v for (m, seed), v in sorted(cells.items()) if m == method}
            over = [v - cells["RTN", s] for s, v in found.items() if ("RTN", s) in cells]
            own = method == "RTN"
            rows.append(
                [
                    *(model, method, str(len(found)), spread(list(found.values()))),
                    "" if own else ", ".join(f"{difference:+.1f}" for difference in over),
                    "" if own else spread(over, "+"),
                ]
            )
    header = ["model", "method", "draws", "mean +- sd", "over RTN, per draw", "mean +- sd"]
    return table(header, rows, left=2)


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation."""
    if len(values) < 2:
        return ", ".join(f"{value:{sign}.2f}" for value in values)
    return f"{statistics.mean(values):{sign}.2f} +- {statistics.stdev(values):.2f}"


def newest(records: Sequence[Record]) -> list[Record]:
    """The newest record of each model, method and draw."""
    found: dict[tuple[str, str, int], Record] = {}
    for record in sorted(records, key=lambda r: r.run["finished"]):
        found[record.model, record.method, record.config["calibration"]["seed"]] = record
    return list(found.values())


def page(records: Sequence[Record]) -> str:
    """The Markdown page."""
    settled = select(records, is_ordinary).shown
    drawn = newest([record for record in records if is_draw(record)])
    about: Mapping[str, Mapping[str, object]] = surroundings()
    parts = [
        "# Does Q-VLM hold up?",
        "Differences of accuracy in points, paired on the questions of the test split; the 95 % "
        "intervals hold together for all rows (Bonferroni). *holds*: the interval is above zero, "
        "*the opposite*: below. The column *paper* is what the paper prints for a larger model.",
        claims_table(settled),
    ]
    if drawn:
        n = sorted({len(record.predictions) for record in drawn})
        parts += [
            "## Over draws of the calibration problems",
            f"W4A4, validation split, {', '.join(map(str, n))} questions. Each draw is another set "
            "of calibration problems, the same for every method; sd is over draws.",
            draws_table(drawn),
        ]
    parts.append(
        bullets(
            [
                "Command: `make claims`",
                f"Questions: {sorted({len(r.predictions) for r in settled})}",
                f"Revision of this page: {revision_in_words(about['git'])}",
            ]
        )
    )
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"))
    given = parser.parse_args(arguments)
    try:
        records = find_records(given.results / "runs")
        if not records:
            raise UserError(f"--results: {given.results} holds no records; run experiment=table2")
        text = page(records)
        write_files({given.results / "claims.md": text})
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

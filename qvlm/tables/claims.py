"""The paper's claims that a miniature can test, and what the records say about each.

`make claims` runs what is missing of Tables 1, 2 and 5 and of `experiment=draws`, and writes
`claims.md`. A difference between methods can come from the questions or from the draw of the
calibration problems. The paired interval of one run covers the questions but not the draw. Where
methods differ in their search, the page therefore also shows the difference for several draws, on
the validation split. Verdicts follow from the intervals by a fixed rule.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from qvlm.command import run_command
from qvlm.evaluation.metrics import paired_difference
from qvlm.markdown import bullets, table
from qvlm.records.record import Record
from qvlm.tables.command import (
    add_runs,
    keep_answers,
    made_with,
    records_of,
    table_parser,
    write_files,
)
from qvlm.tables.comparison import paired
from qvlm.tables.labels import BASELINE, CDM, ERROR_PROXY, LAYERWISE, QVLM, VEO
from qvlm.tables.published import published
from qvlm.tables.report import revision
from qvlm.tables.selection import is_draw, is_ordinary, select

TOKEN = "ZeroQuant-V2, per token"


@dataclass(frozen=True)
class Claim:
    """The claim that one method is more accurate than another.

    Attributes:
        text: The claim in words.
        bits: Label of the bit widths, such as "W4A4".
        first: Our name of the method that should be ahead.
        second: Our name of the method that should be behind.
        printed: Where the paper claims it: table, model, and its names of the two methods. None
            for a control of ours.
    """

    text: str
    bits: str
    first: str
    second: str
    printed: tuple[str, str, str, str] | None = None

    @property
    def points(self) -> float | None:
        """Difference in points that the paper prints, or None for a control of ours."""
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
    Claim(f"CDM helps ({_7B} 1)", "W4A4", CDM, LAYERWISE, _PARTS["CDM"]),
    Claim(f"VEO helps ({_7B} 1)", "W4A4", VEO, LAYERWISE, _PARTS["VEO"]),
    Claim(f"Entropy beats the error as proxy ({_7B} 5)", "W4A4", CDM, ERROR_PROXY, _PROXIES),
    Claim(f"Q-VLM beats per-token ranges ({_7B} 6)", "W4A4", QVLM, TOKEN, _PER_TOKEN),
    Claim("Layer-wise search helps (the control)", "W4A4", LAYERWISE, BASELINE),
    Claim("Q-VLM helps at all (the control)", "W4A4", QVLM, BASELINE),
)


def claims_table(records: Sequence[Record]) -> str:
    """Returns the table of claims: the paired difference on each model, and the verdict.

    Args:
        records: Shown records of all models and methods. The intervals of all rows hold together.
    """
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
    """Returns the verdict on a claim in words.

    Args:
        signs: Per measured model, 1 for an interval above zero, -1 for one below, 0 for one that
            contains zero.
        models: Number of models.
    """
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
    """Returns the table of accuracies over calibration draws.

    Args:
        records: One record per model, method and draw. Each method is compared with the baseline
            within each draw.
    """
    by_model: defaultdict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    for record in records:
        seed = record.config["calibration"]["seed"]
        by_model[record.model][record.method, seed] = record.metrics["classes"]["Avg"]["accuracy"]
    rows = []
    for model, cells in sorted(by_model.items()):
        methods = [m for m in (BASELINE, LAYERWISE, CDM, QVLM) if any(k[0] == m for k in cells)]
        for method in methods:
            found = {seed: v for (m, seed), v in sorted(cells.items()) if m == method}
            over = [v - cells[BASELINE, s] for s, v in found.items() if (BASELINE, s) in cells]
            own = method == BASELINE
            rows.append(
                [
                    *(model, method, str(len(found)), mean_and_deviation(list(found.values()))),
                    "" if own else ", ".join(f"{difference:+.1f}" for difference in over),
                    "" if own else mean_and_deviation(over, "+"),
                ]
            )
    header = ["model", "method", "draws", "mean +- sd", "over RTN, per draw", "mean +- sd"]
    return table(header, rows, left=2)


def mean_and_deviation(values: Sequence[float], sign: str = "") -> str:
    """Returns mean and standard deviation; of a single value, the value.

    Args:
        values: One value per draw.
        sign: "+" to show the sign of positive values.
    """
    if len(values) < 2:
        return ", ".join(f"{value:{sign}.2f}" for value in values)
    return f"{statistics.mean(values):{sign}.2f} +- {statistics.stdev(values):.2f}"


def newest(records: Sequence[Record]) -> list[Record]:
    """Returns the newest record of each model, method and draw."""
    found: dict[tuple[str, str, int], Record] = {}
    for record in sorted(records, key=lambda r: r.run["finished"]):
        found[record.model, record.method, record.config["calibration"]["seed"]] = record
    return list(found.values())


def concerned(records: Sequence[Record]) -> list[Record]:
    """Returns the records that the page is a function of."""
    drawn = [record for record in records if is_draw(record)]
    return [*select(records, is_ordinary).all(), *newest(drawn)]


def page(records: Sequence[Record], made_with: str) -> str:
    """Returns the Markdown page.

    Args:
        records: Records of a folder.
        made_with: Command that regenerates the page.
    """
    settled = select(records, is_ordinary).shown
    drawn = newest([record for record in records if is_draw(record)])
    parts = [
        "# Does Q-VLM hold up?",
        "Differences of accuracy are in points, paired on the questions of the test split. The "
        "95 % intervals hold together for all rows (Bonferroni). A claim *holds* where the "
        "interval is above zero, and *the opposite* is true where it is below. The column *paper* "
        "is what the paper prints for a larger model.",
        claims_table(settled),
    ]
    if drawn:
        n = sorted({len(record.predictions) for record in drawn})
        parts += [
            "## Over draws of the calibration problems",
            f"W4A4, validation split, {', '.join(map(str, n))} questions. Each draw is another set "
            "of calibration problems, the same for every method. *sd* is the standard deviation "
            "over draws.",
            draws_table(drawn),
        ]
    parts.append(
        bullets(
            [
                f"Command: `{made_with}`",
                f"Questions: {', '.join(map(str, sorted({len(r.predictions) for r in settled})))}",
                f"Code: {'; or '.join(dict.fromkeys(map(revision, [*settled, *drawn])))}",
            ]
        )
    )
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = table_parser("claims", "Says which of the paper's claims the records support.")
    add_runs(parser)

    def work(options: argparse.Namespace) -> None:
        records = records_of(options.runs, "table2")
        text = page(records, made_with(parser, options, "runs", "out"))
        write_files({options.out / "claims.md": text})
        keep_answers(options.out, "claims", concerned(records))
        print(text, end="")

    return run_command(parser, work, arguments)


if __name__ == "__main__":
    sys.exit(main())

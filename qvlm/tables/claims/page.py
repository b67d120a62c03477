"""The page of verdicts, as a pure function of the records of the design."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qvlm.markdown import bullets, table
from qvlm.records.record import Record
from qvlm.tables.claims.catalog import CLAIMS, Claim
from qvlm.tables.claims.components import (
    Estimate,
    Prior,
    Spread,
    estimate,
    likeness_of,
    priors_of,
)
from qvlm.tables.claims.design import (
    ASSUMED,
    GROUP,
    MODELS,
    SPLIT,
    Design,
    least_detectable,
)
from qvlm.tables.claims.plan import model_of
from qvlm.tables.comparison import paired
from qvlm.tables.labels import FP
from qvlm.tables.proof import fault
from qvlm.tables.report import signed
from qvlm.tables.selection import LeftOut

COMPARISONS = len(CLAIMS) * len(MODELS)
HEAD = f"""\
# Does Q-VLM hold up?

Each claim of the paper that a miniature can test, on each miniature, as a difference of accuracy in
points. The column *paper* is what the paper prints for a larger model. Both methods answer the same
generated questions of the split `{SPLIT}`, on which nothing was ever tuned, after each training of
the model and each draw of the calibration problems.

The intervals cover questions, draws and trainings together, and all {COMPARISONS} of them hold
together at 95 % (Bonferroni). *Visible* is the least difference that the design finds with a power
of 80 %, as worked out before it ran from the assumptions below.

- **holds**: the interval is above zero.
- **refuted**: the interval is below zero, or wholly below half of the paper's difference.
- **undecided**: anything else, with the largest difference that the interval leaves possible."""

MODEL = """\
*Trainings*, *draws* and *questions* are what each of them adds to the standard error, in points.
The model is a crossed random-effects model of the differences, with Student intervals by
Satterthwaite's degrees of freedom (*df*). How much more trainings and draws differ than questions
alone would make them is estimated for all claims together and draws each claim towards it, as limma
does for genes; `qvlm/tables/claims/components.py` has the formulas."""


@dataclass(frozen=True)
class Answers:
    """The records of the design.

    Attributes:
        records: Proven records by training, bit widths, method and draw.
        left_out: Records that are not analyzed, and why.
    """

    records: dict[tuple[str, str, str, int], Record] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def trainings(self) -> list[str]:
        """Names of the trainings, those of a model together, the shipped one first."""
        return sorted({key[0] for key in self.records}, key=lambda name: (len(name), name))


def concerned(records: Sequence[Record]) -> list[Record]:
    """Returns the records that the page is a function of."""
    return [record for record in records if record.config["group"] == GROUP]


def gather(records: Sequence[Record]) -> Answers:
    """Chooses the records of the design: proven, newest, and of the usual number of questions."""
    own = sorted(concerned(records), key=lambda record: (record.run["finished"], record.name))
    found = Answers()
    if not own:
        return found
    usual = Counter(len(record.predictions) for record in own).most_common(1)[0][0]
    proven: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for record in own:
        proven[record.model] |= {row["layer"]: record.name for row in record.layers}
    for record in own:
        reason = fault(record, proven[record.model])
        count = len(record.predictions)
        if count != usual:
            reason = f"it has {count} questions, the others {usual}"
        if reason is not None:
            found.left_out.append(LeftOut(record, reason))
            continue
        draw = 0 if record.bits == FP else int(record.config["calibration"]["seed"])
        key = (record.model, record.bits, record.method, draw)
        if key in found.records:
            newer = f"{record.name} is the newer record of this cell"
            found.left_out.append(LeftOut(found.records[key], newer))
        found.records[key] = record
    return found


def differences(answers: Answers, claim: Claim, model: str) -> NDArray[np.float64] | None:
    """Returns the differences behind a claim, [trainings, draws, questions] in points.

    They are those of the trainings and draws that are complete: of the first draws as many as give
    the most cells with the most trainings. A method without calibration has the answers of its only
    record in every draw.

    Returns:
        The differences, or None if there is no pair of records.
    """
    names = [name for name in answers.trainings if model_of(name) == model]
    pairs: dict[str, list[NDArray[np.float64]]] = {}
    for name in names:
        pairs[name] = []
        for draw in range(1 + max((key[3] for key in answers.records), default=0)):
            both = [
                _record(answers, name, claim.bits, m, draw) for m in (claim.first, claim.second)
            ]
            answered = paired(both[0], both[1]) if both[0] and both[1] else None
            if answered is None:
                break
            first, second = answered
            pairs[name].append(100 * (first.astype(np.float64) - second))
    best: list[list[NDArray[np.float64]]] = []
    for draws in {len(own) for own in pairs.values()} - {0}:
        whole = [own[:draws] for own in pairs.values() if len(own) >= draws]
        if (len(whole), draws) > (len(best), len(best[0]) if best else 0):
            best = whole
    return np.array(best) if best else None


def _record(answers: Answers, name: str, bits: str, method: str, draw: int) -> Record | None:
    found = answers.records.get((name, bits, method, draw))
    first = answers.records.get((name, bits, method, 0))
    if found is None and first is not None and _uncalibrated(first):
        return first
    return found


def _uncalibrated(record: Record) -> bool:
    """Whether no draw of calibration problems changes a record: its ranges are those of a token."""
    return record.method.endswith(", per token")


def verdict(found: Estimate, points: float | None) -> str:
    """Returns the verdict on a claim in words.

    Args:
        found: Difference with its interval.
        points: Difference that the paper prints, or None for a control of ours.
    """
    if found.high < 0:
        return "refuted: the opposite"
    if points is not None and found.high < points / 2:
        ahead = "ahead, but " if found.low > 0 else ""
        return f"refuted: {ahead}under half of the paper's"
    if found.low > 0:
        return "holds"
    return f"undecided, smaller than {max(found.high, -found.low):.1f}"


Key = tuple[Claim, str]


@dataclass(frozen=True)
class Analysis:
    """The one analysis of all claims, by claim and model.

    Attributes:
        answers: Records of the design.
        spreads: Differences taken apart, of the claims that were measured.
        priors: What the claims share.
        estimates: Differences with their intervals, which hold together.
    """

    answers: Answers
    spreads: dict[Key, Spread]
    priors: dict[str, Prior]
    estimates: dict[Key, Estimate]

    def visible(self, claim: Claim, model: str) -> float:
        """Returns the least difference in points that the cells of a claim could have shown."""
        trainings, draws, questions = self.spreads[claim, model].shape
        design = Design(questions, draws, trainings)
        return least_detectable(design, ASSUMED[model, claim.bits], COMPARISONS)


def analyze(records: Sequence[Record]) -> Analysis:
    """Analyzes the records of a folder that belong to the design."""
    answers = gather(records)
    found = {
        (claim, model): values
        for claim in CLAIMS
        for model in MODELS
        if (values := differences(answers, claim, model)) is not None
    }
    spreads = {key: Spread.of(values) for key, values in found.items()}
    likeness = likeness_of(
        [
            ((model, claim.bits, claim.first), (model, claim.bits, claim.second))
            for claim, model in spreads
        ]
    )
    priors = priors_of(list(spreads.values()), likeness)
    estimates = {key: estimate(spread, priors, COMPARISONS) for key, spread in spreads.items()}
    return Analysis(answers, spreads, priors, estimates)


def page(records: Sequence[Record], made_with: str) -> str:
    """Returns the Markdown page.

    Args:
        records: Records of a folder.
        made_with: Command that regenerates the page.
    """
    made = analyze(records)
    answers, spreads, estimates = made.answers, made.spreads, made.estimates
    parts = [HEAD, verdicts_table(made)]
    parts += ["## Where the uncertainty comes from", MODEL, parts_table(spreads, estimates)]
    parts += _priors(made.priors)
    parts += ["## What ran", *_ran(answers, spreads)]
    parts += ["## What was assumed before it ran", _assumed()]
    if answers.left_out:
        parts += ["## Records that are not analyzed"]
        parts.append(bullets([f"`{e.record.name}`: {e.reason}" for e in answers.left_out]))
    parts += ["## How this was made", bullets([f"Command: `{made_with}`"])]
    return "\n\n".join(parts) + "\n"


def verdicts_table(made: Analysis) -> str:
    """Returns the table of verdicts: a row per claim and model."""
    rows = []
    for claim in CLAIMS:
        for model in MODELS:
            shared = [claim.text, claim.bits, model]
            paper = "" if claim.points is None else f"{claim.points:+.1f}"
            if (claim, model) not in made.estimates:
                rows.append([*shared, paper, "not measured", "", "", "not measured"])
                continue
            own = made.estimates[claim, model]
            visible = made.visible(claim, model)
            rows.append(
                [
                    *(*shared, paper, signed(own.mean)),
                    f"{signed(own.low, 1)} to {signed(own.high, 1)}",
                    *(f"{visible:.1f}", verdict(own, claim.points)),
                ]
            )
    header = ["claim", "bits", "model", "paper", "difference", "interval", "visible", "verdict"]
    return table(header, rows, left=3)


def parts_table(spreads: dict[Key, Spread], estimates: dict[Key, Estimate]) -> str:
    """Returns the table of what adds to each claim's standard error."""
    rows = []
    for (claim, model), own in estimates.items():
        trainings, draws, _ = spreads[claim, model].shape
        errors = [f"{own.errors['T']:.2f}" if trainings > 1 else "not measured"]
        errors += [f"{own.errors['D']:.2f}" if draws > 1 else "not measured"]
        errors += [f"{own.errors['Q']:.2f}", f"{own.freedom:.0f}"]
        rows.append([claim.text, claim.bits, model, f"{trainings} x {draws}", *errors])
    header = [
        "claim",
        "bits",
        "model",
        "trainings x draws",
        "trainings",
        "draws",
        "questions",
        "df",
    ]
    return table(header, rows, left=3)


def _priors(priors: dict[str, Prior]) -> list[str]:
    """Returns what the claims share, as far as it was estimated."""
    lines = [
        f"{name} differ {prior.ratio**0.5:.1f} times as much as their questions alone would make "
        f"them, as all claims say together, with the weight of "
        f"{min(prior.freedom, prior.most):.0f} degrees of freedom."
        for name, prior in (("Trainings", priors["T"]), ("Draws", priors["D"]))
        if prior.freedom > 0
    ]
    return [bullets(lines)] if lines else []


def _ran(answers: Answers, spreads: dict[Key, Spread]) -> list[str]:
    """Returns the tables of trainings, and what the intervals cover."""
    wanted = Design()
    rows, lines = [], []
    for name in answers.trainings:
        full = answers.records.get((name, FP, FP, 0))
        own = [record for key, record in answers.records.items() if key[0] == name]
        weights = next(iter(own)).run["files_hashed"]["model"][:12]
        accuracy = f"{full.metrics['classes']['Avg']['accuracy']:.2f}" if full else "not measured"
        rows.append([model_of(name), name, f"`{weights}`", accuracy, str(len(own))])
    for model in MODELS:
        shapes = {s.shape for (_, own), s in spreads.items() if own == model}
        if not shapes:
            lines.append(f"{model}: not measured.")
            continue
        trainings, draws, questions = min(shapes)
        lines.append(
            f"{model}: {questions} questions of {wanted.questions}, {draws} draws of "
            f"{wanted.draws}, {trainings} trainings of {wanted.trainings}. {_covered(*min(shapes))}"
        )
    header = ["model", "training", "weights", "accuracy in full precision", "cells"]
    return [table(header, rows, left=3), bullets(lines)] if rows else [bullets(lines)]


def _covered(trainings: int, draws: int, _: int) -> str:
    """Says what the intervals of a model do not cover."""
    missing = [("trainings", trainings), ("draws", draws)]
    others = [name for name, count in missing if count < 2]
    if not others:
        return "Its intervals cover questions, draws and trainings."
    return f"Its intervals say nothing about other {' or other '.join(others)}."


def _assumed() -> str:
    rows = [
        [
            *(model, bits, f"{100 * a.differing:.1f}", f"{a.trainings:.1f}", f"{a.draws:.1f}"),
            *(f"{100 * a.common:.0f}", f"{a.freedom:.0f}"),
        ]
        for (model, bits), a in ASSUMED.items()
    ]
    header = ["model", "bits", "questions that differ, %", "sd over trainings", "sd over draws"]
    header += ["common to all cells, %", "df from other claims"]
    return table(header, rows, left=2)

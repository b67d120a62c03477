"""The page of verdicts, as a pure function of the records of the design."""

from collections.abc import Sequence

from qvlm.markdown import bullets, table
from qvlm.records.record import Record
from qvlm.tables.claims.analysis import Analysis, Answers, Key, analyze, verdict
from qvlm.tables.claims.catalog import CLAIMS, OWN, Claim
from qvlm.tables.claims.components import Estimate, Prior, Spread
from qvlm.tables.claims.design import ASSUMED, MODELS, SPLIT, Design
from qvlm.tables.claims.plan import model_of
from qvlm.tables.claims.trainings import trainings_part
from qvlm.tables.labels import FP
from qvlm.tables.report import signed

HEAD = f"""\
# Does Q-VLM hold up?

Each claim of the paper that a miniature can test, on each miniature, as a difference of accuracy in
points. The column *paper* is what the paper prints for a larger model. Both methods answer the same
generated questions of the split `{SPLIT}`, on which nothing was ever tuned, after each training of
the model and each draw of the calibration problems.

The intervals cover questions, draws and trainings together, and all {len(CLAIMS) * len(MODELS)} of
them hold together at 95 % (Bonferroni). *Visible* is the least difference that the design finds
with a power of 80 %, as worked out before it ran from the assumptions below.

- **holds**: the interval is above zero.
- **refuted**: the interval is below zero, or wholly below half of the paper's difference.
- **undecided**: anything else, with the largest difference that the interval leaves possible."""

OURS = f"""\
[RoCo](../docs/method.md) is this project's. The {len(OWN) * len(MODELS)} intervals hold together at
95 %, apart from those of the paper's claims."""

MODEL = """\
*Trainings*, *draws* and *questions* are what each of them adds to the standard error, in points.
The model is a crossed random-effects model of the differences, with Student intervals by
Satterthwaite's degrees of freedom (*df*). How much more trainings and draws differ than questions
alone would make them is estimated for all claims together and draws each claim towards it, as limma
does for genes; `qvlm/tables/claims/components.py` has the formulas."""


def page(records: Sequence[Record], made_with: str) -> str:
    """Returns the Markdown page.

    Args:
        records: Records of a folder.
        made_with: Command that regenerates the page.
    """
    made = analyze(records)
    answers, spreads, estimates = made.answers, made.spreads, made.estimates
    parts = [HEAD, verdicts_table(made, CLAIMS)]
    parts += ["## Our own claims", OURS, verdicts_table(made, OWN)]
    parts += trainings_part(answers)
    parts += ["## Where the uncertainty comes from", MODEL, parts_table(spreads, estimates)]
    parts += _priors(made.priors)
    parts += ["## What ran", *_ran(answers, spreads)]
    parts += ["## What was assumed before it ran", _assumed()]
    if answers.left_out:
        parts += ["## Records that are not analyzed"]
        parts.append(bullets([f"`{e.record.name}`: {e.reason}" for e in answers.left_out]))
    parts += ["## How this was made", bullets([f"Command: `{made_with}`"])]
    return "\n\n".join(parts) + "\n"


def verdicts_table(made: Analysis, claims: Sequence[Claim]) -> str:
    """Returns the table of verdicts: a row per claim and model."""
    rows = []
    for claim in claims:
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
        line = (
            f"{model}: {questions} questions of {wanted.questions}, {draws} draws of "
            f"{wanted.draws}, {trainings} trainings of {wanted.trainings}. {_covered(*min(shapes))}"
        )
        if others := sum(model_of(name) == model for name in answers.trainings) - trainings:
            line += f" Trainings with fewer draws, which are shown by themselves: {others}."
        lines.append(line)
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

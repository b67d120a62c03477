"""The one analysis of all claims, as a pure function of the records of the design."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qvlm.records.record import Record
from qvlm.tables.claims.catalog import CLAIMS, OWN, TOKEN, Claim
from qvlm.tables.claims.components import (
    Estimate,
    Prior,
    Spread,
    estimate,
    likeness_of,
    priors_of,
)
from qvlm.tables.claims.design import ASSUMED, GROUP, MODELS, Design, least_detectable
from qvlm.tables.claims.plan import model_of
from qvlm.tables.comparison import paired
from qvlm.tables.labels import FP
from qvlm.tables.proof import fault
from qvlm.tables.selection import LeftOut, one_setting, usual_parameters

# Claims whose intervals hold together, and how many intervals these are.
FAMILIES = (CLAIMS, OWN)
COMPARISONS = {claim: len(family) * len(MODELS) for family in FAMILIES for claim in family}


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
    """Chooses the records of the design: proven, newest, of one setting for each training."""
    every = sorted(concerned(records), key=lambda record: (record.run["finished"], record.name))
    usual_ones, unusual = usual_parameters(every)
    found = Answers(left_out=unusual)
    own = []
    for model in dict.fromkeys(record.model for record in usual_ones):
        alike = [record for record in usual_ones if record.model == model]
        kept, others = one_setting(alike, ["calibration.seed"])
        own += kept
        found.left_out.extend(others)
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
    the most cells, and of equal ones those with more trainings. A method without calibration has
    the answers of its only record in every draw.

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
        if (len(whole) * draws, len(whole)) > (sum(map(len, best)), len(best)):
            best = whole
    return np.array(best) if best else None


def _record(answers: Answers, name: str, bits: str, method: str, draw: int) -> Record | None:
    found = answers.records.get((name, bits, method, draw))
    first = answers.records.get((name, bits, method, 0))
    if found is None and first is not None and _uncalibrated(first):
        return first
    return found


def _uncalibrated(record: Record) -> bool:
    """Whether no draw of calibration problems changes a record."""
    return record.method == TOKEN


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
        return least_detectable(design, ASSUMED[model, claim.bits], COMPARISONS[claim])


def analyze(records: Sequence[Record]) -> Analysis:
    """Analyzes the records of a folder that belong to the design."""
    answers = gather(records)
    found = {
        (claim, model): values
        for claim in COMPARISONS
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
    estimates = {
        key: estimate(spread, priors, COMPARISONS[key[0]]) for key, spread in spreads.items()
    }
    return Analysis(answers, spreads, priors, estimates)

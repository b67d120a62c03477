"""The design behind the verdicts: what runs, what it costs, and what it can see.

Everything here is worked out before a cell runs, from the numbers of a design and from assumptions
that are stated. `qvlm/tables/claims/components.py` analyzes what the cells then answered.
"""

from dataclasses import dataclass
from math import sqrt

from scipy import stats

from qvlm.data.sizes import MINIATURE_SIZES
from qvlm.tables.claims.catalog import CLAIMS
from qvlm.validation import whole_number

SPLIT = "claims"
MODELS = ("mini_llava", "mini_moe_llava")
GROUP = "claims"  # the group of the experiment's records
POWER = 0.8
# Method files by bit widths. Those without calibration give the same answers for every draw.
METHODS = {
    "w6a6": ("awq", "qlora", "qvlm"),
    "w4a4": (
        *("rtn", "awq", "qlora", "layerwise"),
        *("qvlm_cdm", "qvlm_cdm_error", "qvlm_veo", "qvlm"),
        *("roco", "roco_token"),
    ),
}
UNCALIBRATED = {"w4a4": ("zeroquant",)}
# Seconds of one core: of a cell whatever its questions, and of a question. docs/LOG.md has the run.
CELL_SECONDS, QUESTION_SECONDS = 40.0, 0.03


@dataclass(frozen=True)
class Design:
    """How much is asked of each pair of methods.

    Attributes:
        questions: Number of questions of each cell.
        draws: Number of calibration draws of each method that calibrates.
        trainings: Number of trainings of each model, the shipped one included.
    """

    questions: int = MINIATURE_SIZES[SPLIT]
    draws: int = 5
    trainings: int = 3

    def __post_init__(self) -> None:
        whole_number("questions", self.questions, 1, MINIATURE_SIZES[SPLIT])
        whole_number("draws", self.draws)
        whole_number("trainings", self.trainings)

    @property
    def cells(self) -> int:
        """Number of cells of one model."""
        drawn = sum(map(len, METHODS.values())) * self.draws
        return self.trainings * (drawn + sum(map(len, UNCALIBRATED.values())) + 1)

    def hours(self, models: int = len(MODELS)) -> float:
        """Hours that one core takes for all cells of some models."""
        each = CELL_SECONDS + QUESTION_SECONDS * self.questions
        return models * self.cells * each / 3600


@dataclass(frozen=True)
class Assumptions:
    """What the least detectable effect is worked out from, for one model and bit widths.

    Attributes:
        differing: Share of questions that only one of the two methods answers correctly.
        trainings: Standard deviation of a difference over trainings, in points.
        draws: Standard deviation of a difference over calibration draws, in points.
        common: Share of the questions' variance that all trainings and draws have in common.
        freedom: Degrees of freedom that the other claims add to those of trainings and of draws.
    """

    differing: float
    trainings: float
    draws: float
    common: float = 0.3
    freedom: float = 6.0


# `differing` follows from the intervals of the claims page of the revision e559a5dc152a, which had
# 4,000 questions. The deviations over trainings and draws are assumptions: a third of what the
# questions of a single cell of that page made uncertain was taken for each.
ASSUMED = {
    ("mini_llava", "W4A4"): Assumptions(0.11, 0.5, 0.5),
    ("mini_llava", "W6A6"): Assumptions(0.025, 0.2, 0.2),
    ("mini_moe_llava", "W4A4"): Assumptions(0.21, 0.7, 0.7),
    ("mini_moe_llava", "W6A6"): Assumptions(0.045, 0.3, 0.3),
}


def least_detectable(
    design: Design, assumed: Assumptions, comparisons: int = len(CLAIMS) * len(MODELS)
) -> float:
    """Returns the difference in points that the design finds with a power of 80 %.

    That is `(t(1 - 0.025 / comparisons) + t(0.8)) * error`, with the quantiles of Student's
    distribution and the standard error of the mean difference that the assumptions imply.

    Args:
        design: Design before it runs.
        assumed: Assumptions on the two methods' difference.
        comparisons: Number of intervals that hold together at 95 %.
    """
    cells = design.trainings * design.draws
    one_question = 100**2 * assumed.differing
    terms = {
        "T": assumed.trainings**2 / design.trainings if design.trainings > 1 else 0.0,
        "D": assumed.draws**2 / design.draws if design.draws > 1 else 0.0,
        "Q": one_question * (assumed.common + (1 - assumed.common) / cells) / design.questions,
    }
    freedom = {
        "T": design.trainings - 1 + assumed.freedom,
        "D": design.draws - 1 + assumed.freedom,
        "Q": max(design.questions - 1, 1),
    }
    variance = sum(terms.values())
    known = variance**2 / sum(terms[name] ** 2 / freedom[name] for name in terms)
    quantiles = stats.t.ppf(1 - 0.025 / comparisons, known) + stats.t.ppf(POWER, known)
    return float(quantiles) * sqrt(variance)

"""Do two methods really differ? Paired tests on the questions that both answered.

Per model and bit width one family of comparisons: the hero against every other method, or, where
there is none, every method against the baseline. Full precision is no rival and not in the family;
how far each method drops below it is stated with its own interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qvlm.evaluation.metrics import (
    McNemar,
    PairedDifference,
    holm,
    mcnemar,
    paired_difference,
)
from qvlm.records.record import Record
from qvlm.tables.selection import BASELINE, FP, QVLM

SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Comparison:
    """One method against another.

    Attributes:
        first, second: names of the methods.
        difference: accuracy of the first minus that of the second, in points; the intervals of a
            family hold 95 % together.
        test: the exact test.
        p_holm: its p-value, corrected for the size of the family.
    """

    first: str
    second: str
    difference: PairedDifference
    test: McNemar
    p_holm: float

    @property
    def verdict(self) -> str:
        """In words, at a corrected level of 5 %."""
        if self.p_holm >= SIGNIFICANCE:
            return "not told apart"
        ahead = self.first if self.test.only_a > self.test.only_b else self.second
        return f"{ahead} ahead"


def compare(records: Sequence[Record]) -> tuple[list[Comparison], list[str]]:
    """Table 2's family of comparisons among the records of one model and bit width.

    Returns:
        The comparisons, and a sentence for each that cannot be made.
    """
    methods = [record.method for record in records if record.method != FP]
    if QVLM in methods:
        return compare_pairs(records, [(QVLM, other) for other in methods if other != QVLM])
    if BASELINE in methods:
        return compare_pairs(records, [(other, BASELINE) for other in methods if other != BASELINE])
    return [], []


def compare_pairs(
    records: Sequence[Record], pairs: Sequence[tuple[str, str]]
) -> tuple[list[Comparison], list[str]]:
    """A family of comparisons of methods by name; pairs that are not both there are left out.

    Returns:
        As `compare`.
    """
    methods = {record.method: record for record in records}
    asked, impossible = {}, []
    for first, second in pairs:
        if first not in methods or second not in methods:
            continue
        answers = paired(methods[first], methods[second])
        if answers is None:
            impossible.append(f"{first} and {second} were not asked the same questions")
        else:
            asked[first, second] = answers
    tests = [mcnemar(*answers) for answers in asked.values()]
    corrected = holm([test.p_value for test in tests])
    made = [
        Comparison(*names, paired_difference(*answers, len(asked)), test, p_holm)
        for (names, answers), test, p_holm in zip(asked.items(), tests, corrected, strict=True)
    ]
    return made, impossible


def paired(first: Record, second: Record) -> tuple[NDArray[np.bool_], NDArray[np.bool_]] | None:
    """Which questions each answered rightly, [questions], joined by `question_id`.

    None if the questions or their right answers are not the same.
    """
    a, b = (r.predictions.set_index("question_id").sort_index() for r in (first, second))
    if not (a.index.equals(b.index) and a.index.is_unique and a["answer"].equals(b["answer"])):
        return None
    return a["correct"].to_numpy(dtype=bool), b["correct"].to_numpy(dtype=bool)


def drop(record: Record, reference: Record | None) -> PairedDifference | None:
    """How far a method is below full precision, or None if that is not known."""
    answers = paired(record, reference) if reference is not None else None
    return None if answers is None else paired_difference(*answers)

"""Whether two methods really differ: paired tests on the questions that both answered.

Each pair of model and bit widths has a family of comparisons for Q-VLM and one for each form of our
own method, which are compared with every other method. Where there is none of them, every method is
compared with the baseline. Full precision does not belong to a family: the difference of each
method from it has an interval of its own.
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
from qvlm.tables.labels import BASELINE, FP, QVLM, is_ours

SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Comparison:
    """One method compared with another.

    Attributes:
        first: Name of the first method.
        second: Name of the second method.
        difference: Accuracy of the first minus that of the second, in points. The intervals of a
            family hold together at 95 %.
        test: Exact McNemar test.
        p_holm: Its p-value, adjusted for the size of the family.
    """

    first: str
    second: str
    difference: PairedDifference
    test: McNemar
    p_holm: float

    @property
    def verdict(self) -> str:
        """Result in words, at an adjusted level of 5 %."""
        if self.p_holm >= SIGNIFICANCE:
            return "not told apart"
        ahead = self.first if self.test.only_a > self.test.only_b else self.second
        return f"{ahead} ahead"


def compare(records: Sequence[Record]) -> dict[str, tuple[list[Comparison], list[str]]]:
    """Makes Table 2's families of comparisons among the records of one model and bit widths.

    Returns:
        For each method that is compared with the others: the comparisons, and a sentence for each
        comparison that is not possible.
    """
    methods = [record.method for record in records if record.method != FP]
    leads = [method for method in methods if method == QVLM or is_ours(method)]
    families = {lead: [(lead, other) for other in methods if other != lead] for lead in leads}
    if not families and BASELINE in methods:
        families = {BASELINE: [(other, BASELINE) for other in methods if other != BASELINE]}
    return {lead: compare_pairs(records, pairs) for lead, pairs in families.items()}


def compare_pairs(
    records: Sequence[Record], pairs: Sequence[tuple[str, str]]
) -> tuple[list[Comparison], list[str]]:
    """Makes a family of comparisons.

    Args:
        records: Records of one model and bit widths.
        pairs: Names of the methods of each comparison. A pair without both records is left out.

    Returns:
        The comparisons, and a sentence for each comparison that is not possible.
    """
    methods = {record.method: record for record in records}
    return compare_records(
        [
            (first, methods[first], second, methods[second])
            for first, second in pairs
            if first in methods and second in methods
        ]
    )


def compare_records(
    pairs: Sequence[tuple[str, Record, str, Record]],
) -> tuple[list[Comparison], list[str]]:
    """Makes a family of comparisons.

    Args:
        pairs: Two records with their names, for each comparison.

    Returns:
        The comparisons, and a sentence for each comparison that is not possible.
    """
    asked, impossible = [], []
    for first, one, second, other in pairs:
        answers = paired(one, other)
        if answers is None:
            impossible.append(f"{first} and {second} were not asked the same questions")
        else:
            asked.append(((first, second), answers))
    tests = [mcnemar(*answers) for _, answers in asked]
    adjusted = holm([test.p_value for test in tests])
    made = [
        Comparison(*names, paired_difference(*answers, len(asked)), test, p_holm)
        for (names, answers), test, p_holm in zip(asked, tests, adjusted, strict=True)
    ]
    return made, impossible


def paired(first: Record, second: Record) -> tuple[NDArray[np.bool_], NDArray[np.bool_]] | None:
    """Returns which questions each record answered correctly, joined by `question_id`.

    Returns:
        Two arrays [questions], or None if the questions or their right answers differ.
    """
    a, b = (r.predictions.set_index("question_id").sort_index() for r in (first, second))
    if not (a.index.equals(b.index) and a.index.is_unique and a["answer"].equals(b["answer"])):
        return None
    return a["correct"].to_numpy(dtype=bool), b["correct"].to_numpy(dtype=bool)


def changed(record: Record, reference: Record | None) -> NDArray[np.bool_] | None:
    """Returns for which questions a record gives another answer than full precision.

    Two answers differ if they name different choices, or if only one of them names a choice.

    Returns:
        Mask [questions] in the order of the record's predictions, or None if full precision was not
        asked the same questions.
    """
    if reference is None or paired(record, reference) is None:
        return None
    own = record.predictions.set_index("question_id")["prediction"]
    other = reference.predictions.set_index("question_id")["prediction"].reindex(own.index)
    both = own.astype("Int64").fillna(-1).to_numpy(), other.astype("Int64").fillna(-1).to_numpy()
    return np.asarray(both[0] != both[1], dtype=bool)


def drop(record: Record, reference: Record | None) -> PairedDifference | None:
    """Returns a method's accuracy minus that of full precision, or None if that is not known."""
    answers = paired(record, reference) if reference is not None else None
    return None if answers is None else paired_difference(*answers)

"""What each training of a model says by itself: whether an order of methods belongs to one."""

from qvlm.evaluation.metrics import paired_difference
from qvlm.markdown import table
from qvlm.records.record import Record
from qvlm.tables.claims.analysis import Answers
from qvlm.tables.claims.design import MODELS
from qvlm.tables.claims.plan import model_of
from qvlm.tables.comparison import paired
from qvlm.tables.labels import BASELINE, FP, method_order
from qvlm.tables.report import signed

BITS, DRAW = "W4A4", 0

EACH = f"""\
Accuracy in percent at {BITS} with the first draw of the calibration problems, and in parentheses by
how many points a method is ahead of {BASELINE}, with the 95 % interval of the questions alone. An
order that changes from column to column belongs to a training, and not to the methods."""


def trainings_part(answers: Answers) -> list[str]:
    """Returns the part of the page, a table per model of which there are several trainings."""
    tables = []
    for model in MODELS:
        names = [name for name in answers.trainings if model_of(name) == model]
        if len(names) > 1:
            tables.append(_table(answers, names))
    return ["## After each training", EACH, *tables] if tables else []


def _table(answers: Answers, names: list[str]) -> str:
    found = {key[2] for key in answers.records if key[0] in names and key[1] == BITS}
    rows = [[FP, *(_accuracy(answers.records.get((name, FP, FP, 0))) for name in names)]]
    for method in sorted(found, key=method_order):
        own = [answers.records.get((name, BITS, method, DRAW)) for name in names]
        bases = [answers.records.get((name, BITS, BASELINE, DRAW)) for name in names]
        rows.append([method, *map(_against, own, bases)])
    return table(["method", *names], rows)


def _accuracy(record: Record | None) -> str:
    if record is None:
        return "not measured"
    return f"{record.metrics['classes']['Avg']['accuracy']:.2f}"


def _against(record: Record | None, base: Record | None) -> str:
    """The accuracy, and the difference to the baseline where both answered the same questions."""
    both = paired(record, base) if record and base and record is not base else None
    if both is None:
        return _accuracy(record)
    ahead = paired_difference(*both)
    span = f"{signed(ahead.low, 1)} to {signed(ahead.high, 1)}"
    return f"{_accuracy(record)} ({signed(ahead.difference, 1)}, {span})"

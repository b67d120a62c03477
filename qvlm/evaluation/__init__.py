"""ScienceQA through lm-eval: a task, an adapter for a model in memory, and the statistics.

`evaluate` is the whole of it; the rest is for tables and for comparing two runs question by
question. Quantization is unknown here: a model that generates is all that is asked for.
"""

from qvlm.evaluation.evaluator import Evaluation, evaluate
from qvlm.evaluation.metrics import (
    CLASSES,
    McNemar,
    PairedDifference,
    class_metrics,
    holm,
    mcnemar,
    paired_difference,
    skill_metrics,
    wilson,
)

__all__ = [
    "CLASSES",
    "Evaluation",
    "McNemar",
    "PairedDifference",
    "class_metrics",
    "evaluate",
    "holm",
    "mcnemar",
    "paired_difference",
    "skill_metrics",
    "wilson",
]

"""Evaluation on ScienceQA through lm-eval, and the statistics of its answers.

Start with `evaluator.py`: `evaluate` asks every question and scores every answer. `adapter.py` lets
lm-eval use a model that is already in memory, `task.py` holds the functions that `scienceqa.yaml`
names, `answers.py` keeps answers on disk so that an interrupted evaluation can continue, and
`metrics.py` has accuracies, intervals and paired tests. `likelihood.py` scores given texts, and
`divergence.py` compares a model with what it was before. Nothing here knows of quantization.
"""

from qvlm.evaluation.adapter import Watch
from qvlm.evaluation.divergence import Divergence, Reference, answer_passages
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
    "Divergence",
    "Evaluation",
    "McNemar",
    "PairedDifference",
    "Reference",
    "Watch",
    "answer_passages",
    "class_metrics",
    "evaluate",
    "holm",
    "mcnemar",
    "paired_difference",
    "skill_metrics",
    "wilson",
]

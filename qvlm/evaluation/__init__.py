"""Evaluation on ScienceQA through lm-eval, and the statistics of its answers.

Start with `evaluator.py`: `evaluate` asks every question and scores every answer. `adapter.py` lets
lm-eval use a model that is already in memory, `task.py` holds the functions that `scienceqa.yaml`
names, `answers.py` keeps answers on disk so that an interrupted evaluation can continue, and
`metrics.py` has accuracies, intervals and paired tests. `likelihood.py` scores given texts, and
`divergence.py` compares a model with what it was before. Nothing here knows of quantization.

This file imports none of them, so that pages of recorded answers, which need `metrics.py` alone, do
not wait for PyTorch and transformers.
"""

"""Q-VLM (arXiv 2410.08119), one file per part of the paper; open `method.py` first.

Cross-layer dependency mining is in `dependency.py` and `partition.py`, joint search in `search.py`
(with `search_options.py`, `candidates.py` and `trial.py`), and visual encoder optimization in
`vision.py` (with `vision_loss.py` and `simulation.py`).
"""

from qvlm.methods.qvlm.method import QVLM

__all__ = ["QVLM"]

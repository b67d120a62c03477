"""The paper's claims, each with a verdict: a designed experiment and one analysis of it.

`catalog.py` lists the claims, `design.py` says what it costs and what it can see,
`plan.py` says which cells run over which trainings,
`components.py` takes the uncertainty of a difference apart, `analysis.py` does so for all claims
together, and `page.py` makes the page.
"""

from qvlm.tables.claims.analysis import Analysis, analyze, concerned, verdict
from qvlm.tables.claims.catalog import CLAIMS, Claim
from qvlm.tables.claims.command import main, texts_of
from qvlm.tables.claims.page import page

__all__ = [
    "CLAIMS",
    "Analysis",
    "Claim",
    "analyze",
    "concerned",
    "main",
    "page",
    "texts_of",
    "verdict",
]

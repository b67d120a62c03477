"""Outcomes of sensitivity that nobody measured, and a method that breaks one layer on purpose."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from qvlm.methods.base import MethodReport
from qvlm.methods.rtn import RTN
from qvlm.quantization import QuantLinear, Walk
from qvlm.tables.sensitivity.measure import Outcome
from qvlm.tables.sensitivity.parts import (
    ACTIVATIONS,
    ALONE,
    BOTH,
    DEPTH,
    EVERYTHING,
    OTHERS,
    PART,
    WEIGHTS,
    WHOLE,
    Part,
    State,
)
from qvlm.tables.sensitivity.rows import rows_of
from tests.helpers.configs import load

BROKEN = "model.layers.1.mlp.down_proj"
PARTS = (Part("attention", PART, frozenset("ab")), Part("decoder 0", DEPTH, frozenset("a")))


class Breaks(RTN):
    """RTN, which then sets the weight of one layer to zero."""

    name = "Breaks"

    def quantize(self, walk: Walk) -> MethodReport:
        """Quantizes every linear and breaks `BROKEN`."""
        report = super().quantize(walk)
        layer = walk.model.get_submodule(BROKEN)
        assert isinstance(layer, QuantLinear)
        assert layer.weight is not None
        layer.weight.zero_()
        return report


def planted_states() -> list[State]:
    """The states of a model of three linears."""
    every = frozenset("abc")
    states = [State(Part("nothing", WHOLE, frozenset()), ALONE, BOTH, frozenset())]
    for part in (Part(EVERYTHING, WHOLE, every), *PARTS):
        operands = (BOTH,) if part.level == DEPTH else (BOTH, WEIGHTS, ACTIVATIONS)
        states += [State(part, ALONE, some, part.layers) for some in operands]
        if part.level != WHOLE:
            states.append(State(part, OTHERS, BOTH, every - part.layers))
    return states


def planted_outcome(nats: float, wrong: int = 0, questions: int = 40) -> Outcome:
    """Ten tokens a question, of which the first `wrong` are answered differently and wrongly."""
    random = np.random.default_rng(0)
    spread = 10 * nats * random.uniform(0.5, 1.5, questions)
    letters: list[int | None] = [1 if row < wrong else 0 for row in range(questions)]
    right = [row >= wrong for row in range(questions)]
    return Outcome([10] * questions, spread.tolist(), [], letters, right)


def planted_rows(model: str = "mini_llava") -> pd.DataFrame:
    """The rows of a model in which each linear costs as much alone as any other."""
    cell: Any = SimpleNamespace(config=load(f"model={model}", "data.split=validation"))
    costs = {state: 0.01 * len(state.layers) for state in planted_states()}
    found = {state: planted_outcome(cost, round(400 * cost)) for state, cost in costs.items()}
    return rows_of(cell, planted_outcome(0.0), found)

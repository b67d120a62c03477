"""All tasks, in the order of their importance."""

from functools import partial

from qvlm.tables.gpu.bench import Bench
from qvlm.tables.gpu.correctness import correctness
from qvlm.tables.gpu.forms import FORMS, TOKEN
from qvlm.tables.gpu.limits import limits
from qvlm.tables.gpu.methods import methods
from qvlm.tables.gpu.miniatures import miniatures
from qvlm.tables.gpu.models import models
from qvlm.tables.gpu.tiles import tune_all


def run(bench: Bench) -> None:
    """Does all tasks whose lines are missing, while there is time."""
    bench.do("limits", "", "", "", "", work=partial(limits, bench))
    for form in (*FORMS, *TOKEN):
        task = ("correctness", "", form.name, "", "shapes of LLaVA-13B")
        bench.do(*task, work=partial(correctness, bench, form))
    tune_all(bench)
    first, *others = bench.sizes.models
    models(bench, [first])
    miniatures(bench)
    methods(bench)
    models(bench, others)

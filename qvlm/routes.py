"""The commands of `qvlm`: one line each, which `--help` shows and the Makefile's targets call.

A command that is added here needs a target of the same name in the Makefile, or an entry in
`WITHOUT_TARGET` of tests/unit/test_main.py that says why it has none.
"""

from dataclasses import dataclass

from qvlm.command import program


@dataclass(frozen=True)
class Route:
    """A command: `qvlm NAME`.

    Attributes:
        does: What the command does, in half a sentence.
        module: Module whose `main(arguments)` returns the exit code. Not for `overrides`.
        experiments: Names of the experiments whose cells the page needs. They run first.
        design: Module whose `plan(words)` says which cells the page needs, where the experiments'
            own options do not.
        overrides: Words of the command line that the command stands for, instead of a module.
        closing: Text that is printed after such a run.
    """

    does: str
    module: str = ""
    experiments: tuple[str, ...] = ()
    design: str = ""
    overrides: tuple[str, ...] = ()
    closing: str = ""


ROUTES = {
    "demo": Route(
        "a first look, in less than a minute; the same as no words at all",
        overrides=("-m", "experiment=demo"),
        closing="\nThis was a demonstration: a model of two million weights, 500 generated "
        "questions, and methods\nthat search nothing. `table2` measures all methods on 4,000 "
        "questions, and --help shows the rest.",
    ),
    "table1": Route("makes Table 1: the parts of Q-VLM", "qvlm.tables.table1", ("table1",)),
    "table2": Route("makes Table 2: models, methods, bits", "qvlm.tables.table2", ("table2",)),
    "table4": Route(
        "measures packed models: seconds, memory, accuracy",
        "qvlm.tables.table4.__main__",
        ("table4", "table4_exact"),
    ),
    "table4-scale": Route(
        "measures the paper's architectures at full size", "qvlm.tables.table4_scale.__main__"
    ),
    "peers": Route(
        "times packed layers beside those of other libraries", "qvlm.tables.peers.__main__"
    ),
    "table5": Route("makes Table 5: entropy as proxy", "qvlm.tables.table5", ("table5",)),
    "ablation": Route("takes the parts of RoCo apart", "qvlm.tables.ablation", ("ablation",)),
    "claims": Route(
        "says which claims of the paper hold",
        "qvlm.tables.claims",
        ("claims",),
        "qvlm.tables.claims.plan",
    ),
    "table-real": Route(
        "measures a real language model on plain text",
        "qvlm.tables.table_real",
        ("table_real", "table_real_first", "table_real_methods", "table_real_search"),
    ),
    "outliers": Route("shows the outliers of a model", "qvlm.tables.outliers"),
    "sensitivity": Route(
        "shows which part of a model its loss comes from", "qvlm.tables.sensitivity.__main__"
    ),
    "report": Route("makes a page of all records, to look at in a browser", "qvlm.report.__main__"),
    "workspace": Route("arranges the runs in a W&B account", "qvlm.report.workspace"),
    "gpu": Route("measures packed models on a GPU", "qvlm.tables.gpu.__main__"),
    "fit": Route("says which models fit a memory budget", "qvlm.planning.footprint"),
    "verify": Route("recomputes the committed pages", "qvlm.tables.verify"),
    "audit": Route("checks the paper's numbers against each other", "qvlm.tables.audit"),
    "diff": Route("says why two runs differ", "qvlm.tables.diff"),
    "gate": Route("compares a run with the checkpoint's published answers", "qvlm.tables.gate"),
    "verify-portable": Route(
        "computes cells as other machines would and compares them", "qvlm.tables.portable.__main__"
    ),
    "preflight": Route(
        "says what Table 2 would read, need and take",
        overrides=("-m", "experiment=table2", "preflight=true"),
    ),
}


def listing() -> str:
    """Returns the commands as `--help` shows them."""
    return "\n".join(f"  {program()} {name:<15} {route.does}" for name, route in ROUTES.items())

"""The commands of `qvlm`: one line each, which `--help` shows and the Makefile's targets call.

A command that is added here needs a target of the same name in the Makefile, or an entry in
`WITHOUT_TARGET` of tests/unit/test_main.py that says why it has none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qvlm.command import program
from qvlm.errors import UserError


@dataclass(frozen=True)
class Route:
    """A command: `qvlm NAME`.

    Attributes:
        does: What the command does, in half a sentence.
        module: Module whose `main(arguments)` returns the exit code. Not for `overrides`.
        experiments: Names of the experiments whose cells the page needs. They run first.
        design: Module whose `plan(words)` says which cells the page needs, where the experiments'
            own options do not.
        adds: Whether the page is kept with its answers, so that `add=true` adds to it.
        overrides: Words of the command line that the command stands for, instead of a module.
        closing: Text that is printed after such a run.
        keys: Short names of options, for a command that is a run. The first has to be given, and
            takes several values, separated by commas.
    """

    does: str
    module: str = ""
    experiments: tuple[str, ...] = ()
    design: str = ""
    adds: bool = True
    overrides: tuple[str, ...] = ()
    closing: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)

    def expand(self, words: Sequence[str]) -> list[str]:
        """Returns the words of a command line with the names of options in full.

        Raises:
            UserError: If the option that has to be given is not.
        """
        needed = next(iter(self.keys))
        found = []
        for word in words:
            key, equals, value = word.partition("=")
            given = f"[{value}]" if key == needed else value
            found.append(f"{self.keys[key]}={given}" if key in self.keys and equals else word)
        given_any = f"{self.keys[needed]}="
        if not any(w.startswith(given_any) and w[len(given_any) :].strip("[], ") for w in found):
            raise UserError(f"{needed} is not given. Give {needed}=NAME, or several: A,B,C.")
        return found


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
    "table2-real": Route(
        "makes Table 2 of a real language model", "qvlm.tables.table2_real", ("table2_real",)
    ),
    "table3": Route(
        "makes Table 3: VQA, for who has the data",
        "qvlm.tables.table3",
        ("table3", "table3_sqa"),
        adds=False,
    ),
    "table4": Route(
        "measures packed models: seconds, memory, accuracy",
        "qvlm.tables.table4.__main__",
        ("table4", "table4_exact"),
        adds=False,
    ),
    "table4-scale": Route(
        "measures the paper's architectures at full size", "qvlm.tables.table4_scale.__main__"
    ),
    "peers": Route(
        "times packed layers beside those of other libraries", "qvlm.tables.peers.__main__"
    ),
    "table5": Route("makes Table 5: entropy as proxy", "qvlm.tables.table5", ("table5",)),
    "table6": Route(
        "makes Table 6: granularities against methods",
        "qvlm.tables.table6",
        ("table6", "table6_token"),
    ),
    "calibration": Route(
        "compares calibration on image-text pairs and on all problems",
        "qvlm.tables.calibration",
        ("calibration",),
    ),
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
        (
            *("table_real", "table_real_methods", "table_real_first"),
            *("table_real_draws", "table_real_ranges", "table_real_search"),
        ),
    ),
    "eval": Route(
        "runs tasks of lm-eval on a model: task=arc_easy,...",
        keys={
            "task": "tasks.names",
            "include_path": "tasks.include_path",
            "num_fewshot": "tasks.num_fewshot",
            "chat_template": "tasks.chat_template",
            "limit": "evaluation.limit",
        },
    ),
    "lm-eval": Route("runs lm-eval itself, which then knows --model qvlm", "qvlm.lm_eval_model"),
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
    "export": Route("writes a packed checkpoint for other engines", "qvlm.exporting.command"),
    "prove": Route("says what a quantized checkpoint really holds", "qvlm.proving.command"),
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

"""Table 1: `python -m qvlm.tables.table1` shows what each part of Q-VLM brings.

The paper adds its parts to the QLoRA baseline. Here they are added to the layer-wise search with
the weights that Q-VLM itself has, so that nothing but the part differs; QLoRA is shown beside it.
"""

import sys
from collections.abc import Sequence

from qvlm.tables import command
from qvlm.tables.ablation import Ablation, Printed
from qvlm.tables.published import published, rows
from qvlm.tables.selection import CDM, QVLM, VEO

HEAD = """\
# Table 1: what the parts of Q-VLM bring

CDM: cross-layer dependency mining, dependent layers searched jointly. VEO: visual encoder
optimisation. *Layer-wise* is Q-VLM with neither, the control; *QLoRA* has NormalFloat weights and
no search. Accuracy in percent on all questions; an answer that names no choice counts as wrong.
Search is the wall time of choosing ranges, fine-tuning included; memory the peak of the whole
process while it quantizes in simulation, which is not the size of the quantized model.

Rows that begin with *paper* are what the paper prints, for another, larger model, whose parts are
added to QLoRA; its memory is that of the packed model."""

OURS = {"QLoRA": "QLoRA", "QLoRA+CDM": CDM, "QLoRA+VEO": VEO, "Q-VLM": QVLM}
ABLATION = Ablation(
    head=HEAD,
    printed={
        (row["bits"], OURS[row["method"]]): [
            Printed(
                row["model"],
                row["method"],
                row["accuracy"],
                row["search_cost_hours"],
                row["memory_gib"],
            )
        ]
        for row in rows(published("table1"))
    },
    methods=("QLoRA", "Layer-wise", CDM, VEO, QVLM),
    pairs=(
        *((part, "Layer-wise") for part in (CDM, VEO, QVLM)),
        *((QVLM, other) for other in ("QLoRA", CDM, VEO)),
    ),
)
TABLE = command.Table("table1", "Table 1", ABLATION.wanted, ABLATION.long, ABLATION.render)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return command.run(TABLE, arguments)


if __name__ == "__main__":
    sys.exit(main())

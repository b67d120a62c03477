"""Table 1: `python -m qvlm.tables.table1` shows what each part of Q-VLM brings.

The paper adds the parts to the QLoRA baseline. Here they are added to layer-wise search with the
same weights as Q-VLM, so that only the part differs. QLoRA has a row of its own.
"""

import sys
from collections.abc import Sequence

from qvlm.tables import command
from qvlm.tables.labels import CDM, LAYERWISE, QVLM, VEO
from qvlm.tables.published import published, rows
from qvlm.tables.variants import Ablation, Printed

HEAD = """\
# Table 1: what the parts of Q-VLM bring

CDM is cross-layer dependency mining: dependent layers are searched jointly. VEO is visual encoder
optimization. *Layer-wise* is the control, Q-VLM without both. *QLoRA* has NormalFloat weights and
no search. Accuracy is in percent on all questions, and an answer that names no choice counts as
wrong. Search is the CPU time of choosing ranges, fine-tuning included. Memory is the peak of the
whole process while it quantizes in simulation, which is not the size of the quantized model.

Rows that begin with *paper* are what the paper prints for a larger model, where the parts are added
to QLoRA. There, memory is that of the packed model."""

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
    methods=("QLoRA", LAYERWISE, CDM, VEO, QVLM),
    pairs=(
        *((part, LAYERWISE) for part in (CDM, VEO, QVLM)),
        *((QVLM, other) for other in ("QLoRA", CDM, VEO)),
    ),
)
TABLE = ABLATION.table("table1", "Table 1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return command.run(TABLE, arguments)


if __name__ == "__main__":
    sys.exit(main())

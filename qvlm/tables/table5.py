"""Table 5: `python -m qvlm.tables.table5` compares two proxies for the dependency of layers."""

import sys
from collections.abc import Sequence

from qvlm.tables import command
from qvlm.tables.labels import CDM, ERROR_PROXY
from qvlm.tables.published import published, rows
from qvlm.tables.variants import Ablation, Printed

HEAD = """\
# Table 5: entropy or quantization error as the proxy of dependency

Both rows group layers into blocks by a proxy of how much they depend on each other, and search each
block jointly, without visual encoder optimization. The proxy of *CDM only* is the conditional
entropy of eq. 4, that of *error proxy* the mean relative quantization error of the two activations.
Accuracy is in percent on all questions, and an answer that names no choice counts as wrong. Search
is the CPU time of mining and searching. Memory is the peak of the whole process while it quantizes
in simulation.

Rows that begin with *paper* are what the paper prints for larger models."""

OURS = {"entropy": CDM, "quantization error": ERROR_PROXY}
ABLATION = Ablation(
    head=HEAD,
    printed={
        (bits, ours): [
            Printed(
                row["model"], row["proxy"], row[f"{bits}_accuracy"], row[f"{bits}_search_hours"]
            )
            for row in rows(published("table5"))
            if row["proxy"] == proxy
        ]
        for bits in ("W6A6", "W4A4")
        for proxy, ours in OURS.items()
    },
    methods=(ERROR_PROXY, CDM),
    pairs=((CDM, ERROR_PROXY),),
)
TABLE = ABLATION.table("table5", "Table 5")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return command.run(TABLE, arguments)


if __name__ == "__main__":
    sys.exit(main())

"""Table 2 of a real language model: `python -m qvlm.tables.table2_real`, a page like Table 2's."""

import sys
from collections.abc import Sequence

from qvlm.records.record import Record
from qvlm.tables import command
from qvlm.tables.labels import REAL
from qvlm.tables.selection import Selection, is_simulated
from qvlm.tables.table2 import HEAD, long, page

TITLE = "# Table 2 of a real language model: accuracy in percent"
MODEL = """\
smollm2_llava is SmolLM2-135M-Instruct, a LLaMA with outlier channels and massive activations, with
the vision tower of mini_llava. It was tuned on the problems that the miniatures were trained on
([text.md](../docs/text.md)). Weights of SmolLM2 have been rounded to 4 bits once before, and *FP*
is the model with these weights, as they are after tuning."""
CHANCE = "A random choice is right for {:.1f} % of the questions."


def wanted(record: Record) -> bool:
    """Whether a record concerns this table."""
    return record.model == REAL and is_simulated(record)


def render(selection: Selection, made_with: str) -> str:
    """Returns the page.

    Args:
        selection: Records to show.
        made_with: Command that regenerates the page.
    """
    parts = [TITLE, MODEL, HEAD]
    if selection.shown:
        choices = selection.shown[0].predictions["n_choices"]
        parts.append(CHANCE.format(100 * float((1 / choices).mean())))
    return page(parts, selection, made_with)


TABLE = command.Table("table2_real", "Table 2 of a real language model", wanted, long, render)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return command.run(TABLE, arguments)


if __name__ == "__main__":
    sys.exit(main())

"""The part of the model card that shows what the embedded models can do and what they cost.

It follows from the committed answers of Table 2 and from the files beside the weights.
`python -m qvlm verify` compares it, and `python -m qvlm verify --write` writes it anew.
"""

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from safetensors import safe_open

from qvlm.evaluation.metrics import CLASSES, skill_metrics
from qvlm.markdown import bullets, replaced, table
from qvlm.models.load import MINIATURES
from qvlm.records.record import Record

BEGIN, END = "<!-- from results/answers/table2 -->", "<!-- to here -->"
CARD = Path("qvlm/models/miniature/README.md")
_WEIGHTS, _LOG = "model.safetensors", "training.jsonl"


def with_part(card: str, records: Sequence[Record]) -> str | None:
    """Returns the text of the card with the part between the marks made anew.

    Args:
        card: Text of the card.
        records: Records of Table 2, of which those of embedded models in full precision count.

    Returns:
        The text, or None if it has no such part.
    """
    names = sorted(path.parent.name for path in MINIATURES.glob("*/config.json"))
    full = {r.model: r for r in records if r.bit_widths.is_full_precision}
    found = {name: full[name] for name in names if name in full}
    parts = [_accuracy(found), bullets([_cost(MINIATURES / name) for name in names])]
    return replaced(card, BEGIN, END, "\n\n".join(parts))


def _accuracy(records: Mapping[str, Record]) -> str:
    """Returns the tables of accuracy by class and by skill, a column per model."""
    counts = {record.metrics["classes"]["Avg"]["n"] for record in records.values()}
    classes = [
        [
            name,
            *(
                "{accuracy:.1f} ({ci_low:.1f} to {ci_high:.1f})".format_map(
                    record.metrics["classes"][name]
                )
                for record in records.values()
            ),
        ]
        for name in CLASSES
    ]
    by_skill = [
        {
            row["skill"]: f"{row['accuracy']:.1f}"
            for row in skill_metrics(r.predictions).to_dict("records")
        }
        for r in records.values()
    ]
    names = dict.fromkeys(skill for found in by_skill for skill in found)
    skills = [[name, *(found.get(name, "") for found in by_skill)] for name in names]
    asked = " or ".join(f"{count:,}" for count in sorted(counts))
    sentence = f"Percent of {asked} questions, with 95 % Wilson intervals."
    return "\n\n".join(
        [sentence, table(["class", *records], classes), table(["skill", *records], skills)]
    )


def _cost(folder: Path) -> str:
    """Returns a sentence on an embedded model's size and training."""
    with safe_open(folder / _WEIGHTS, framework="pt") as opened:
        shapes = [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118
    last = json.loads((folder / _LOG).read_text(encoding="utf-8").splitlines()[-1])
    return (
        f"`{folder.name}`: {sum(map(prod, shapes)):,} parameters, "
        f"{(folder / _WEIGHTS).stat().st_size / 2**20:.1f} MiB; trained in "
        f"{last['minutes']:.0f} minutes on one thread,\n  {last['lookup_steps']:,} look-up and "
        f"{last['joint_steps']:,} joint steps."
    )

"""`python -m qvlm.tables.ablation`: what each part of RoCo brings, with both kinds of scales."""

import sys
from collections.abc import Sequence

from qvlm.tables import command
from qvlm.tables.claims.catalog import TOKEN
from qvlm.tables.labels import BASELINE
from qvlm.tables.variants import Ablation

HEAD = """\
# What the parts of RoCo bring

*GPTQ* rounds weights with compensation, *QuaRot (RTN)* rotates the language model and rounds to
nearest, *QuaRot* does both, and *RoCo* also weighs calibration tokens by the confidence of the
float model. *SmoothQuant* is a relative that rescales channels. Rows that end in *per token* have a
scale for each token of the language model; the others have static scales, per channel by default.
*ZeroQuant-V2, per token* is rounding to nearest with scales per token, the control of those rows.
[method.md](../docs/method.md) explains the parts.

Accuracy is in percent on all questions, and an answer that names no choice counts as wrong. Search
is the processor time of quantizing. Memory is the peak of the whole process while it quantizes in
simulation, which is not the size of the quantized model."""

PARTS = ("GPTQ", "QuaRot (RTN)", "QuaRot", "RoCo")


def _pairs(control: str, parts: Sequence[str]) -> list[tuple[str, str]]:
    """Each part against what it is added to, and the whole against the control.

    Args:
        control: Name of the control, which rounds to nearest.
        parts: Names of GPTQ, QuaRot (RTN), QuaRot and RoCo.
    """
    compensated, rotated, both, whole = parts
    pairs = [(compensated, control), (rotated, control), (both, compensated), (both, rotated)]
    return [*pairs, (whole, both), (whole, control)]


OF_TOKENS = tuple(f"{part}, per token" for part in PARTS)
ABLATION = Ablation(
    head=HEAD,
    printed={},
    methods=(BASELINE, "SmoothQuant", *PARTS, TOKEN, *OF_TOKENS),
    pairs=(*_pairs(BASELINE, PARTS), *_pairs(TOKEN, OF_TOKENS)),
)
TABLE = ABLATION.table("ablation", "the ablation")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return command.run(TABLE, arguments)


if __name__ == "__main__":
    sys.exit(main())

"""Whether all experts of a mixture are there, and whether each was calibrated."""

import re
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

_EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(.+)")
_ENOUGH = 4  # experts whose only scale cannot be alike by chance


def missing(names: Mapping[str, object]) -> dict[str, str]:
    """Finds experts that lack a projection which others of their mixture have.

    Args:
        names: Full names of the layers of a checkpoint, quantized or not, without ".weight".

    Returns:
        What is missing, by mixture.
    """
    mixtures: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        if found := _EXPERT.fullmatch(name):
            mixtures[found[1]][int(found[2])].add(found[3])
    said = {}
    for mixture, experts in mixtures.items():
        parts = set().union(*experts.values())
        absent = [
            f"{index}.{part}"
            for index in range(max(experts) + 1)
            for part in sorted(parts - experts.get(index, set()))
        ]
        if absent:
            sentence = f"{len(absent)} projections of its experts are missing, first {absent[0]}"
            said[mixture] = sentence
    return said


def uncalibrated(scales: Mapping[str, Tensor]) -> dict[str, str]:
    """Finds mixtures in which every expert has the same single scale.

    Args:
        scales: Scales of each quantized layer by name.

    Returns:
        What is wrong, by mixture and projection.
    """
    kinds: dict[str, list[float]] = defaultdict(list)
    for name, scale in scales.items():
        if (found := _EXPERT.fullmatch(name)) and scale.numel() == 1:
            kinds[f"{found[1]}.*.{found[3]}"].append(float(scale))
    return {
        kind: f"all its {len(values)} experts have the scale {values[0]:.3g}: not calibrated"
        for kind, values in kinds.items()
        if len(values) >= _ENOUGH and len({*values}) == 1
    }

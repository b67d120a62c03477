"""Where the loss comes from, as far as the searches of the methods recorded it.

A search writes down the error of what it settled: AWQ per block, layer-wise search and Q-VLM per
run of linears. These are squared errors of outputs on calibration rows, each in the unit of its
search, so layers can be compared and methods cannot. Methods without a search record none.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from qvlm.records.record import Record


@dataclass(frozen=True)
class Loss:
    """The errors of one record.

    Attributes:
        record: Record that holds them.
        layers: Mean error by the name of the layer, in the order of the data.
        kinds: Mean error by the kind of linear that comes last in what was searched together.
    """

    record: Record
    layers: dict[str, float]
    kinds: dict[str, float]


def losses(record: Record) -> Loss | None:
    """Returns the errors that a record holds, or None if it holds none."""
    layers: defaultdict[str, list[float]] = defaultdict(list)
    kinds: defaultdict[str, list[float]] = defaultdict(list)
    for block in _blocks(record.run["report"].get("details")):
        error = block.get("error")
        if not isinstance(error, int | float) or not isinstance(block.get("block"), str):
            continue
        layers[block["block"]].append(float(error))
        units = block.get("units")
        if isinstance(units, list) and units and isinstance(units[-1], list) and units[-1]:
            kinds[str(units[-1][-1]).rpartition(".")[2]].append(float(error))
    if not layers:
        return None
    return Loss(
        record,
        {name: fmean(errors) for name, errors in layers.items()},
        {name: fmean(errors) for name, errors in kinds.items()},
    )


def _blocks(details: Any) -> Iterator[Mapping[str, Any]]:
    blocks = details.get("blocks") if isinstance(details, Mapping) else None
    yield from (block for block in blocks or [] if isinstance(block, Mapping))


def short_name(layer: str) -> str:
    """Returns a name that fits an axis: "V2" in the vision tower, "L5", "P" for the projector."""
    number = next((word for word in layer.split(".") if word.isdecimal()), "")
    if number:
        return ("V" if "vision" in layer else "L") + number
    return "P" if "projector" in layer else layer.rpartition(".")[2]

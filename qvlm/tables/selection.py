"""Which records a table may show: one setting per model, one record per cell, every one proven.

A folder of runs gathers more than one table: a quick try on five questions, cells from before the
weights were retrained, a method with other parameters. A row is comparable with its neighbours only
if everything but bit width and method is the same, so per model the setting with the most cells is
shown, in its newest form; what is set aside is named with the reason.

Then the proof: a record whose layers were seen to take more values than its bits allow is refused,
whatever it scored. An older record never takes its place: the newest code could not prove it.

Left out: damaged records, which `find_records` does not return but raises.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qvlm.evaluation.metrics import CLASSES
from qvlm.records.record import Record

FP = "FP"
QVLM = "Q-VLM"
BASELINE = "RTN"
# The paper's order, controls first; any other method comes after these, the hero last.
_METHODS = (FP, BASELINE, "AWQ", "QLoRA", "Layer-wise")
# What the parts of Q-VLM are called, each switched on alone (see `qvlm.methods.qvlm`).
CDM = f"{QVLM}, CDM only"
VEO = f"{QVLM}, VEO only"
ERROR_PROXY = f"{CDM}, error proxy"


@dataclass(frozen=True)
class LeftOut:
    """A record that the table does not show, and why."""

    record: Record
    reason: str


@dataclass(frozen=True)
class Selection:
    """What a folder of runs has to say to a table.

    Attributes:
        shown: by model, bit width (widest first) and method.
        refused: cells of the table whose record proves nothing.
        set_aside: records of another setting, and older ones.
    """

    shown: list[Record] = field(default_factory=list)
    refused: list[LeftOut] = field(default_factory=list)
    set_aside: list[LeftOut] = field(default_factory=list)

    def by_cell(self) -> dict[str, dict[str, list[Record]]]:
        """model -> bit width -> records shown, full precision under its own width."""
        cells: dict[str, dict[str, list[Record]]] = {}
        for record in self.shown:
            cells.setdefault(record.model, {}).setdefault(record.bits, []).append(record)
        return cells


def whole_method(record: Record) -> bool:
    """Whether a record is of a method, and not of a part of Q-VLM, which has tables of its own."""
    return not record.method.startswith(f"{QVLM}, ") and is_ordinary(record)


def is_ordinary(record: Record) -> bool:
    """Whether a record is of simulation, and not one of many draws: those have their own pages."""
    return execution(record) == "simulated" and not is_draw(record)


def is_draw(record: Record) -> bool:
    """Whether a record is of `experiment=draws`, which varies the calibration problems."""
    return record.config["group"] == "draws"


def execution(record: Record) -> str:
    """How quantized layers computed: see `RunConfig.execution`."""
    return str(record.run.get("execution", "simulated"))


def select(records: Iterable[Record], wanted: Callable[[Record], bool] = whole_method) -> Selection:
    """Chooses and proves; the same records in any order give the same selection.

    Args:
        records: of a folder of runs.
        wanted: which of them are a table's affair; the others are not mentioned.
    """
    models: defaultdict[str, list[Record]] = defaultdict(list)
    for record in sorted(filter(wanted, records), key=lambda record: record.name):
        models[record.model].append(record)
    selection = Selection()
    for model in sorted(models):
        chosen, aside = _one_per_cell(*_one_setting(models[model]))
        selection.set_aside.extend(aside)
        proven = {row["layer"]: record.name for record in chosen for row in record.layers}
        for record in sorted(chosen, key=_order):
            reason = fault(record, proven)
            if reason is None:
                selection.shown.append(record)
            else:
                selection.refused.append(LeftOut(record, reason))
    return selection


def fault(record: Record, proven: Mapping[str, str]) -> str | None:
    """Why a record must not be shown, or None.

    Args:
        record: of any method.
        proven: every layer that a record of this model proves, and the name of that record.
    """
    reason = _metrics_fault(record)
    if reason or record.bits == FP:
        return reason
    if not record.layers:
        return "its proof of bits is empty"
    claim = re.fullmatch(r"W(\d+)A(\d+)", record.bits)
    if claim is None:
        return f"{record.bits} is no bit width"
    faults = []
    for row in record.layers:
        for part, width, levels, most in (
            ("weight", row["w_bits"], row["weight_levels"], int(claim[1])),
            ("input", row["a_bits"], row["input_levels"], int(claim[2])),
        ):
            if width > most:
                faults.append(f"{row['layer']}: {width} bits per {part} value")
            elif levels < 1:
                faults.append(f"{row['layer']}: {part} never seen")
            elif levels > 2**width:
                faults.append(
                    f"{row['layer']}: {levels} {part} values per scale, {2**width} allowed"
                )
    absent = sorted(proven.keys() - {row["layer"] for row in record.layers})
    faults += [f"{layer}: missing from the proof, which {proven[layer]} has" for layer in absent]
    if not faults:
        return None
    return faults[0] + (f" (and {len(faults) - 1} more)" if faults[1:] else "")


def _metrics_fault(record: Record) -> str | None:
    for name in CLASSES:
        row = record.metrics.get("classes", {}).get(name)
        if row is None:
            return f"class {name} is missing from its metrics"
        for key in ("accuracy", "ci_low", "ci_high", "unparsable") if row["n"] else ():
            value = row[key]
            if value is None or not (math.isfinite(value) and 0 <= value <= 100):
                return f"{key} of class {name} is {value}"
    overall = record.metrics["classes"]["Avg"]
    right, n = int(record.predictions["correct"].sum()), len(record.predictions)
    if overall["n"] != n or (n and abs(overall["accuracy"] - 100 * right / n) > 1e-6):
        return f"its metrics do not follow from its predictions ({right} of {n} right)"
    return None


def _order(record: Record) -> tuple[Any, ...]:
    return (*bits_order(record.bits), method_order(record.method))


def bits_order(bits: str) -> tuple[int, ...]:
    """Sorts bit widths as the paper does: full precision, then wide to narrow."""
    return tuple(-int(width) for width in re.findall(r"\d+", bits)) if bits != "FP" else (-99,)


def method_order(method: str) -> tuple[int, str]:
    """Sorts methods: controls, the paper's baselines, any other, Q-VLM."""
    rank = _METHODS.index(method) if method in _METHODS else len(_METHODS) + (method == QVLM)
    return rank, method


def _one_setting(records: Sequence[Record]) -> tuple[list[Record], list[LeftOut]]:
    """The records of one model in the setting with the most cells, and the others.

    Full precision knows neither quantizer nor calibration, so quantized records decide first.
    """
    quantized = [record for record in records if record.bits != FP]
    main = _most(quantized or records, _setting)
    kept, aside = [], []
    for record in records:
        if differing := _differences(record, main):
            aside.append(LeftOut(record, f"another setting: {'; '.join(differing)}"))
        else:
            kept.append(record)
    newest = max(kept, key=_age)
    current = []
    for record in kept:
        if record.run["files_hashed"] == newest.run["files_hashed"]:
            current.append(record)
        else:
            aside.append(LeftOut(record, f"{newest.name} has newer weights or data"))
    return current, aside


def _differences(record: Record, main: Record) -> list[str]:
    """In what the setting of a record is not that of `main`, in words."""
    own, wanted = _shared(record), _shared(main)
    if record.bits == FP:
        wanted = {key: value for key, value in wanted.items() if key in own}
    return _unlike(own, wanted)


def _unlike(own: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Where two configurations differ, in words."""
    a, b = _flat(own), _flat(wanted)
    return [
        f"{key} is {_word(a.get(key))}, not {_word(b.get(key))}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]


def _one_per_cell(
    records: Sequence[Record], aside: list[LeftOut]
) -> tuple[list[Record], list[LeftOut]]:
    """The newest record of each bit width and method, in the parameters that most cells have."""
    chosen: list[Record] = []
    for method in sorted({record.method for record in records}):
        own = [record for record in records if record.method == method]
        parameters = _parameters(_most(own, _parameters))
        for bits in sorted({record.bits for record in own}):
            cell = [record for record in own if record.bits == bits]
            usual = [record for record in cell if _parameters(record) == parameters]
            best = max(usual or cell, key=_age)
            chosen.append(best)
            for record in cell:
                if _parameters(record) != _parameters(best):
                    differing = "; ".join(_unlike(_own(record), _own(best)))
                    aside.append(LeftOut(record, f"{best.name} is shown: {differing}"))
                elif record is not best:
                    aside.append(LeftOut(record, f"{best.name} is the newer record of this cell"))
    return chosen, sorted(aside, key=lambda left: left.record.name)


def _most(records: Sequence[Record], key: Callable[[Record], Hashable]) -> Record:
    """The newest record whose key is shared by the most cells; the newest of them in a tie."""
    cells: defaultdict[Hashable, set[tuple[str, str]]] = defaultdict(set)
    for record in records:
        cells[key(record)].add((record.bits, record.method))
    return max(records, key=lambda record: (len(cells[key(record)]), _age(record)))


def _age(record: Record) -> tuple[str, str]:
    return record.run["finished"], record.name


def _shared(record: Record) -> dict[str, Any]:
    """What rows of one table must have in common."""
    influences = record.run["influences"]
    return {key: value for key, value in influences.items() if key not in ("method", "bits")}


def _setting(record: Record) -> Hashable:
    return frozenset((key, repr(value)) for key, value in _flat(_shared(record)).items())


def _parameters(record: Record) -> Hashable:
    return frozenset((key, repr(value)) for key, value in _flat(_own(record)).items())


def _own(record: Record) -> dict[str, Any]:
    """What the method was told."""
    return record.run["influences"]["method"]


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _word(value: Any) -> str:
    return "null" if value is None else str(value)

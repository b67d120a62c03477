"""Which records a table may show: one setting per model, one record per cell, each of them proven.

A folder of runs holds more than one table needs: a quick try on five questions, cells from before
the weights were retrained, a method with other parameters. Rows are comparable only if everything
but bit widths and method is the same. Per model, the table therefore shows the setting with the
most cells, in its newest form. It names the records that it sets aside, and the reason.

The chosen records are then checked (`qvlm.tables.proof`). A record whose layers take more values
than its bits allow is refused, whatever its accuracy. An older record of the same cell never takes
its place, because the newest code could not prove the cell.

Damaged records do not get here: `find_records` raises an error for them.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qvlm.bits import BitWidths
from qvlm.records.record import Record
from qvlm.tables.labels import bits_order, is_part_of_qvlm, method_order
from qvlm.tables.proof import fault
from qvlm.validation import shown


@dataclass(frozen=True)
class LeftOut:
    """A record that the table does not show, and why."""

    record: Record
    reason: str


@dataclass(frozen=True)
class Selection:
    """The records of a folder, divided for one table.

    Attributes:
        shown: Records that the table shows, sorted by model, bit widths (widest first) and method.
        refused: Records of the table's cells that fail the checks of `qvlm.tables.proof`.
        set_aside: Records of another setting, and older records of a shown cell.
    """

    shown: list[Record] = field(default_factory=list)
    refused: list[LeftOut] = field(default_factory=list)
    set_aside: list[LeftOut] = field(default_factory=list)

    def all(self) -> list[Record]:
        """Returns all records of the selection: a page is a pure function of them."""
        return [*self.shown, *(left.record for left in (*self.refused, *self.set_aside))]

    def by_cell(self) -> dict[str, dict[BitWidths, list[Record]]]:
        """Returns the shown records by model and bit widths, in the order of `shown`."""
        cells: dict[str, dict[BitWidths, list[Record]]] = {}
        for record in self.shown:
            cells.setdefault(record.model, {}).setdefault(record.bit_widths, []).append(record)
        return cells


def of_whole_method(record: Record) -> bool:
    """Whether a record is of a whole method and not of a part of Q-VLM."""
    return not is_part_of_qvlm(record.method) and is_ordinary(record)


def is_ordinary(record: Record) -> bool:
    """Whether a record has no page of its own, as other executions, claims and other data have."""
    return is_simulated(record) and not is_of_claims(record)


def is_simulated(record: Record) -> bool:
    """Whether a record holds generated answers to problems, in simulated execution."""
    generated = record.kind == "problems" and not is_ranked(record)
    return generated and execution(record) == "simulated"


def is_ranked(record: Record) -> bool:
    """Whether the likeliest choice was taken, and no answer was generated."""
    return record.run["influences"]["evaluation"].get("scoring") == "rank"


def is_of_claims(record: Record) -> bool:
    """Whether a record is of the claims, whose cells vary draws and trainings."""
    return record.config["group"] == "claims"


def execution(record: Record) -> str:
    """How the quantized layers of a record computed (see `RunConfig.execution`)."""
    return str(record.run.get("execution", "simulated"))


def select(
    records: Iterable[Record], wanted: Callable[[Record], bool] = of_whole_method
) -> Selection:
    """Chooses the records of a table and checks them. The order of the records has no effect.

    Args:
        records: Records of a folder of runs.
        wanted: Whether a record concerns the table. The selection does not mention other records.
    """
    models: defaultdict[str, list[Record]] = defaultdict(list)
    for record in sorted(filter(wanted, records), key=lambda record: record.name):
        models[record.model].append(record)
    selection = Selection()
    for model in sorted(models):
        chosen, aside = _one_per_cell(*one_setting(models[model]))
        selection.set_aside.extend(aside)
        proven = {row["layer"]: record.name for record in chosen for row in record.layers}
        for record in sorted(chosen, key=_order):
            reason = fault(record, proven)
            if reason is None:
                selection.shown.append(record)
            else:
                selection.refused.append(LeftOut(record, reason))
    return selection


def _order(record: Record) -> tuple[Any, ...]:
    return *bits_order(record.bit_widths), method_order(record.method)


def usual_parameters(records: Sequence[Record]) -> tuple[list[Record], list[LeftOut]]:
    """Divides records into those with the parameters that most records of their method have.

    Under the method's name, the others would be taken for that method.

    Returns:
        The records with the usual parameters, in their order, and the others.
    """
    usual = {
        method: _most([record for record in records if record.method == method], _parameters)
        for method in {record.method for record in records}
    }
    kept, aside = [], []
    for record in records:
        main = usual[record.method]
        if _parameters(record) == _parameters(main):
            kept.append(record)
        else:
            differing = "; ".join(_unlike(_own(record), _own(main)))
            aside.append(LeftOut(record, f"other parameters than most of its method: {differing}"))
    return kept, aside


def one_setting(
    records: Sequence[Record], varying: Sequence[str] = ()
) -> tuple[list[Record], list[LeftOut]]:
    """Returns one model's records in the setting with the most cells, and the other records.

    Records in full precision have no quantizer and no calibration. Quantized records therefore
    decide, if there are any.

    Args:
        records: Records of one model.
        varying: Options and groups of options, such as "calibration.seed" and "quantizer", in which
            the rows of a page differ, and which are therefore no part of the setting.
    """
    if not records:
        return [], []
    quantized = [record for record in records if not record.bit_widths.is_full_precision]
    main = _most(quantized or records, lambda record: _hashable(_shared(record, varying)), varying)
    kept, aside = [], []
    for record in records:
        if differing := _differences(record, main, varying):
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


def _differences(record: Record, main: Record, varying: Sequence[str]) -> list[str]:
    """Says where the setting of a record differs from that of `main`."""
    own, wanted = _shared(record, varying), _shared(main, varying)
    if record.bit_widths.is_full_precision:
        parts = record.run["influences"]
        wanted = {key: value for key, value in wanted.items() if key.partition(".")[0] in parts}
    return _unlike(own, wanted)


def _unlike(own: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Says where two configurations differ."""
    a, b = _flat(own), _flat(wanted)
    return [
        f"{key} is {shown(a.get(key))}, not {shown(b.get(key))}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]


def _one_per_cell(
    records: Sequence[Record], aside: list[LeftOut]
) -> tuple[list[Record], list[LeftOut]]:
    """Chooses the newest record of each cell among those with the usual parameters.

    Returns:
        The chosen records, and those set aside: `aside` and the ones not chosen.
    """
    usual, unusual = usual_parameters(records)
    newest: dict[tuple[str, str], Record] = {}
    for record in sorted(usual, key=_age):
        newest[record.method, record.bits] = record
    older = [
        LeftOut(record, f"{best.name} is the newer record of this cell")
        for record in usual
        if record is not (best := newest[record.method, record.bits])
    ]
    left = [*aside, *unusual, *older]
    return [*newest.values()], sorted(left, key=lambda entry: entry.record.name)


def _most(
    records: Sequence[Record], key: Callable[[Record], Hashable], varying: Sequence[str] = ()
) -> Record:
    """Returns the newest record among those whose key is shared by the most cells."""
    cells: defaultdict[Hashable, set[tuple[object, ...]]] = defaultdict(set)
    for record in records:
        draw = record.config.get("calibration", {}).get("seed")
        row = {k: v for k, v in _flat(record.run["influences"]).items() if _is_any(k, varying)}
        cell = (record.model, record.bits, record.method, draw, _hashable(row))
        cells[key(record)].add(cell)
    return max(records, key=lambda record: (len(cells[key(record)]), _age(record)))


def _age(record: Record) -> tuple[str, str]:
    return record.run["finished"], record.name


def _shared(record: Record, varying: Sequence[str]) -> dict[str, Any]:
    """Returns the options that the rows of one table have in common."""
    own = ("method", "bits", *varying)
    options = _flat(record.run["influences"])
    return {key: value for key, value in options.items() if not _is_any(key, own)}


def _is_any(option: str, names: Sequence[str]) -> bool:
    """Whether an option is one of these, or belongs to a group of these."""
    return any(option == name or option.startswith(f"{name}.") for name in names)


def _parameters(record: Record) -> Hashable:
    return _hashable(_own(record))


def _hashable(nested: Mapping[str, Any]) -> Hashable:
    # An option that is null is one that an older record does not have.
    given = {key: value for key, value in _flat(nested).items() if value is not None}
    return frozenset((key, repr(value)) for key, value in given.items())


def _own(record: Record) -> dict[str, Any]:
    """Returns the method's node of the configuration."""
    return record.run["influences"]["method"]


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turns {"a": {"b": 1}} into {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

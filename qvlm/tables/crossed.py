"""Records of methods under several settings of one option, for pages that show a row for each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qvlm.records.record import Record
from qvlm.tables.labels import bits_order, method_order
from qvlm.tables.selection import LeftOut, Selection, of_whole_method, one_setting, select


@dataclass(frozen=True)
class Crossed:
    """The records of a folder, chosen per setting.

    Attributes:
        shown: Quantized records, by model and in the order of the page.
        full: The record in full precision of each model that has one.
        selection: All of them as one selection, for what pages say of records.
    """

    shown: dict[str, list[Record]]
    full: dict[str, Record]
    selection: Selection


def crossed_by(
    records: Sequence[Record],
    setting: Callable[[Record], str],
    settings: Sequence[str],
    varying: Sequence[str],
) -> Crossed:
    """Chooses the records of each setting as for a table of its own.

    Args:
        records: Records of a folder of runs.
        setting: Says in words which setting a quantized record has.
        settings: Settings in the order of the page. Records of any other are not mentioned.
        varying: Options and groups of options in which the settings differ. In all others the
            settings of a model are alike, so that their rows stand side by side.
    """
    concerned = [
        record
        for record in records
        if of_whole_method(record)
        and (record.bit_widths.is_full_precision or setting(record) in settings)
    ]
    aside: dict[str, LeftOut] = {}
    ordinary = []
    for model in sorted({record.model for record in concerned}):
        own = [record for record in concerned if record.model == model]
        kept, others = one_setting(own, varying)
        ordinary += kept
        aside |= {entry.record.name: entry for entry in others}
    full = [record for record in ordinary if record.bit_widths.is_full_precision]
    quantized = [record for record in ordinary if not record.bit_widths.is_full_precision]
    chosen: dict[str, Record] = {}
    refused: dict[str, LeftOut] = {}
    for words in settings:
        own = [record for record in quantized if setting(record) == words]
        found = select([*full, *own]) if own else Selection()
        chosen |= {record.name: record for record in found.shown}
        refused |= {entry.record.name: entry for entry in found.refused}
        aside |= {entry.record.name: entry for entry in found.set_aside}

    def order(record: Record) -> tuple[object, ...]:
        whole = record.bit_widths.is_full_precision
        at = -1 if whole else settings.index(setting(record))
        cell = bits_order(record.bit_widths), method_order(record.method)
        return record.model, *cell, at, record.name

    in_order = sorted(chosen.values(), key=order)
    joined = Selection(in_order, [*refused.values()], [*aside.values()])
    shown: dict[str, list[Record]] = {}
    references = {}
    for record in in_order:
        if record.bit_widths.is_full_precision:
            references[record.model] = record
        else:
            shown.setdefault(record.model, []).append(record)
    return Crossed(shown, references, joined)

"""What a report shows: the records it may show, in order, each with its number and its mark."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qvlm.records.record import Record
from qvlm.tables import table1, table5
from qvlm.tables.claims import Analysis, Claim, analyze
from qvlm.tables.labels import FP, method_order
from qvlm.tables.proof import fault
from qvlm.tables.selection import Selection, execution, is_of_claims, of_whole_method, select

MARKS = 8  # shapes and colors that the style sheet tells apart


@dataclass(frozen=True)
class Content:
    """The records of a folder, divided for the parts of the report.

    Attributes:
        whole: Records of whole methods, which most parts show.
        parts: Records of Tables 1 and 5, by the name of the table.
        packed: Records of packed execution.
        claims: Analysis of the records of the claims' design.
        texts: Proven records on plain text.
    """

    whole: Selection
    parts: dict[str, Selection]
    packed: Selection
    claims: Analysis
    texts: Sequence[Record] = ()

    @classmethod
    def of(cls, records: Sequence[Record]) -> "Content":
        """Divides the records of a folder. The order of the records has no effect."""
        texts = sorted((r for r in records if r.kind == "text"), key=lambda record: record.name)
        records = [record for record in records if record.kind == "problems"]
        parts = {}
        for table in (table1.TABLE, table5.TABLE):
            selection = select(records, table.wanted)
            quantized = [r for r in selection.shown if not r.bit_widths.is_full_precision]
            if any(not of_whole_method(record) for record in quantized):
                parts[table.name] = selection
        whole, packed = select(records, of_whole_method), select(records, _is_packed)
        proven = [record for record in texts if fault(record, {}) is None]
        return cls(whole, parts, packed, analyze(records), proven)

    @cached_property
    def records(self) -> list[Record]:
        """Every record that some part shows, each once."""
        found: dict[str, Record] = {}
        for selection in (self.whole, *self.parts.values(), self.packed):
            found |= {record.name: record for record in selection.shown}
        return list(found.values())

    @cached_property
    def refused(self) -> list[tuple[Record, str]]:
        """Records that are refused, and why, each once."""
        return self._left_out("refused")

    @cached_property
    def set_aside(self) -> list[tuple[Record, str]]:
        """Records that no part shows although nothing is wrong with them, and why, each once."""
        seen = {record.name for record in self.records}
        return [entry for entry in self._left_out("set_aside") if entry[0].name not in seen]

    def _left_out(self, kind: str) -> list[tuple[Record, str]]:
        selections = (self.whole, *self.parts.values(), self.packed)
        entries = [entry for selection in selections for entry in getattr(selection, kind)]
        return [*{e.record.name: (e.record, e.reason) for e in entries}.values()]

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number under which the page names a record, by the name of the record."""
        return {record.name: number for number, record in enumerate(self.every)}

    @cached_property
    def every(self) -> list[Record]:
        """Every record that the page names: shown, refused, or behind a claim."""
        behind = [pair for key in self.claims.spreads for pair in self.first_pair(*key)]
        named = [*self.records, *(record for record, _ in self.refused), *behind, *self.texts]
        return [*{record.name: record for record in named}.values()]

    def first_pair(self, claim: Claim, model: str) -> list[Record]:
        """Returns the records behind a claim, of the shipped training and the first draw."""
        found = self.claims.answers.records
        keys = [(model, claim.bits, method, 0) for method in (claim.first, claim.second)]
        return [found[key] for key in keys if key in found]

    @cached_property
    def marks(self) -> dict[str, int]:
        """The mark of each method, 0 for full precision: a shape and a color."""
        methods = {record.method for record in self.records} - {FP}
        ordered = sorted(methods, key=method_order)
        return {FP: 0} | {name: 1 + i % (MARKS - 1) for i, name in enumerate(ordered)}

    def reference(self, record: Record) -> Record | None:
        """The full-precision record of the same model, or None."""
        for other in self.records:
            if other.model == record.model and other.bit_widths.is_full_precision:
                return other
        return None


def _is_packed(record: Record) -> bool:
    return execution(record) == "packed" and not is_of_claims(record)


def provenance(record: Record) -> dict[str, Any]:
    """Returns where the numbers of a record come from, for the page's card.

    Returns:
        Text by title: run, command, revision, code version, versions, hardware, seed, date.
    """
    run = record.run
    git, hardware = run["git"], run["hardware"]
    revision = git.get("revision") or "not in a git repository"
    machine = [str(hardware[key]) for key in ("cpu", "gpu") if hardware.get(key)]
    if hardware.get("cores"):
        machine.append(f"{hardware['cores']} cores, {run.get('threads')} threads")
    if hardware.get("memory_gib"):
        machine.append(f"{hardware['memory_gib']:g} GiB")
    data = record.config.get("data", {})
    return {
        "Cell": f"{record.model}, {record.method}, {record.bits}",
        "Run": record.name,
        "Command": run.get("command", "not recorded"),
        "Commit": revision + (", with local changes" if git.get("dirty") else ""),
        "Code version": run.get("code", "not recorded")[:16],
        "Versions": ", ".join(f"{name} {value}" for name, value in run["versions"].items()),
        "Hardware": f"{run.get('device', '')}: {', '.join(machine)}",
        "Seed": str(run.get("seed", "not recorded")),
        "Data": f"{data.get('name')}, split {data.get('split')}, {len(record.predictions)} asked",
        "Finished": run["finished"],
    }

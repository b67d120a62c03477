"""The models that Table 4 measures: packed checkpoints whose cells are recorded and proven."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qvlm.errors import UserError
from qvlm.models.load import load_model
from qvlm.models.loaded import LoadedModel
from qvlm.packing import ORIGIN, read_origin
from qvlm.records.record import Record, find_records
from qvlm.tables.labels import FP, bits_order
from qvlm.tables.proof import fault
from qvlm.tables.selection import execution, is_of_claims, select
from qvlm.tables.table4.facts import NOT_PACKED, disagreements


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        record: Record of its cell, which holds its accuracy.
        folder: Folder of its checkpoint, or the name of an embedded miniature in full precision.
        device: Device on which it runs.
        others: Records of the same method and bit widths that are not packed, by execution.
    """

    record: Record
    folder: str
    device: str
    others: Mapping[str, Record] = field(default_factory=dict)

    def disagreements(self) -> dict[str, list[str]]:
        """Returns the questions that this model answers otherwise (see `facts.disagreements`)."""
        return disagreements(self.record, self.others)

    def load(self) -> LoadedModel:
        """Returns the model as it is measured. What is not packed is bfloat16."""
        return load_model(self.folder, self.record.model, device=self.device, dtype="bfloat16")


def find_subjects(runs: Path, packed: Path, device: str) -> dict[str, list[Subject]]:
    """Finds the models to measure. A checkpoint without a proven cell is refused with a warning.

    Args:
        runs: Folder of records.
        packed: Folder of packed checkpoints.
        device: Device on which the models will run.

    Returns:
        Subjects by model: full precision first, then packed checkpoints from wide to narrow.

    Raises:
        UserError: If there is no packed checkpoint, or a model has no record in full precision.
    """
    records = find_records(runs)
    by_hash = {record.run["hash"]: record for record in records}
    found: dict[str, list[Subject]] = {}
    for folder in sorted(path.parent for path in packed.glob(f"*/{ORIGIN}")):
        record, reason = _proven(folder, by_hash)
        if record is None:
            print(f"warning: refused {folder}: {reason}", file=sys.stderr)
            continue
        found.setdefault(record.model, []).append(Subject(record, str(folder), device))
    if not found:
        raise UserError(
            f"--packed: {packed} holds no packed models. Give the folders that "
            "`python run.py -m experiment=table4` writes."
        )
    others = {name: _cells(records, name) for name in NOT_PACKED}
    for model, subjects in found.items():
        full = others["simulated"].get((model, FP, FP))
        if full is None:
            raise UserError(
                f"{model} has no record in full precision. "
                "Run `python run.py -m experiment=table4`."
            )
        for index, subject in enumerate(subjects):
            key = (model, subject.record.bits, subject.record.method)
            alike = {name: cells[key] for name, cells in others.items() if key in cells}
            subjects[index] = replace(subject, others=alike)
        subjects.sort(key=lambda s: (bits_order(s.record.bit_widths), s.record.method))
        subjects.insert(0, Subject(full, full.config["model"]["path"], device))
    return found


def records_of(subjects: Sequence[Subject]) -> list[Record]:
    """Returns the records behind the rows of some subjects, those of other executions included."""
    return [record for subject in subjects for record in (subject.record, *subject.others.values())]


def _proven(folder: Path, by_hash: Mapping[str, Record]) -> tuple[Record | None, str | None]:
    """Returns the record of a checkpoint's cell, or None and the reason why there is none."""
    try:
        record = by_hash.get(read_origin(folder).hash)
    except UserError as error:
        return None, str(error)
    if record is None:
        return None, "its cell is not recorded"
    reason = fault(record, {})
    return (None, reason) if reason else (record, None)


def _cells(records: Sequence[Record], name: str) -> dict[tuple[str, ...], Record]:
    """Returns the proven cells of an execution, by model, bits and method."""
    shown = select(records, lambda r: execution(r) == name and not is_of_claims(r)).shown
    return {(record.model, record.bits, record.method): record for record in shown}

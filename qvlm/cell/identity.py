"""`Cell`: a configuration that was checked, and what identifies its record.

A record is identified by what its numbers depend on: the part of the configuration that
`influences` keeps, the code version, and the hashes of the files that the cell reads. All of it is
worked out once, by `Cell.of`, and the cell is handed on from the plan of a sweep through its
launcher to the pipeline.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qvlm.cell.checks import check_options
from qvlm.cell.inputs import checkpoint_folder, settle_evaluation
from qvlm.cell.method import method_file
from qvlm.cell.settled import settle
from qvlm.config.schema import RunConfig, canonical, influences
from qvlm.data.text import text_folder
from qvlm.errors import RunError, UserError
from qvlm.models.checkpoints.hub import local_folder
from qvlm.packing import read_origin, require_own, resolve_folder
from qvlm.records import provenance
from qvlm.records.record import Record, find_record, identify

CHECKPOINT_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".tiktoken")
TEXT_FILES = (".txt",)
DATA_FILES = (".parquet", ".json", ".arrow", ".png", ".jpg", ".jpeg")
TASK_FILES = (*DATA_FILES, ".yaml", ".yml", ".py", ".jsonl", ".csv", ".tsv", ".txt")


@dataclass(frozen=True)
class Cell:
    """One cell, and what identifies its record.

    Attributes:
        config: Configuration in its one form; see `resolve`.
        hash: Hash of the three attributes below, 64 hexadecimal digits.
        influences: Part of the configuration that can change a number.
        code: Code version, 64 hexadecimal digits.
        files_hashed: Content hash by what was hashed: "model", and "vision_tower", "data", "tasks"
            and "task_data" if they are folders of their own.
    """

    config: RunConfig
    hash: str
    influences: dict[str, Any]
    code: str
    files_hashed: dict[str, str]

    @classmethod
    def of(cls, config: RunConfig) -> "Cell":
        """Checks a configuration and identifies its cell. Fetches the checkpoint and hashes it.

        Raises:
            UserError: if an option is wrong, or the checkpoint is neither here nor can be fetched.
        """
        config = resolve(config)
        check_options(config)
        config = settle_evaluation(config)
        _require_place_of_its_own(config)
        files, code, parts = _hash_files(config), code_version(config), influences(config)
        return cls(config, identify(parts, code, files), parts, code, files)

    @property
    def path(self) -> Path:
        """The folder of the record."""
        config = self.config
        names = [config.model.name, config.method_name, config.bits.label.lower()]
        if config.execution != "simulated":
            names.append(config.execution)
        return config.runs_dir / "-".join([*names, self.hash[:8]])

    @property
    def result(self) -> Path:
        """The folder that the cell leaves: its record, or the packed model if nothing else."""
        return self.path if self.config.evaluate else Path(str(self.config.save_packed))

    @property
    def identity(self) -> dict[str, Any]:
        """The entries of `run.json` that identify the record."""
        names = ("hash", "influences", "code", "files_hashed")
        return {name: getattr(self, name) for name in names}

    def find_record(self) -> tuple[Record | None, str]:
        """The complete record, or None and why there is none ("" if it was never computed)."""
        return find_record(self.path, self.hash)

    def is_recorded(self) -> bool:
        """Whether nothing is left to compute: the record is complete, the packed model saved.

        Raises:
            UserError: if `save_packed` holds other files.
        """
        saved = self.is_saved()
        record = self.find_record()[0] if self.config.evaluate else None
        done = record is not None or not self.config.evaluate
        return saved and done and not self.config.force

    def is_saved(self) -> bool:
        """Whether `save_packed` holds the packed model of this cell, or is not given.

        With `force` it does not, since it is then written anew.

        Raises:
            UserError: if the folder holds other files, which are never replaced.
        """
        if self.config.save_packed is None:
            return True
        folder = resolve_folder(self.config.save_packed)
        try:
            if not self.config.force and read_origin(folder).hash == self.hash:
                return True
        except UserError:
            pass  # it is no finished save
        require_own(folder, self.config.stream)
        return False

    def on(self, device: str) -> "Cell":
        """The same cell on another device, which is not part of its identity."""
        return replace(self, config=replace(self.config, device=device))

    def with_threads(self, threads: int) -> "Cell":
        """The same cell with a number of threads unless it has one; its identity is the same."""
        if self.config.threads is not None:
            return self
        return replace(self, config=replace(self.config, threads=threads))

    def require_same_code(self) -> None:
        """Makes sure that this process runs the code that the cell was identified with.

        A job may start hours after its sweep was planned, in a process that imports what the files
        hold by then.

        Raises:
            RunError: if the files have changed.
        """
        if code_version(self.config) != self.code:
            raise RunError(
                f"The code of {self.config.title} has changed since the sweep was planned. Give "
                "the same command again."
            )


def resolve(config: RunConfig) -> RunConfig:
    """Brings a configuration into its one form.

    A packed checkpoint settles method, bits, quantizer and calibration, whatever the options say.
    Full precision has no bit widths and no other method.

    Raises:
        UserError: if the packed checkpoint does not say how it was made, or is of another version.
    """
    if config.model.packed is None:
        return canonical(config)
    if config.save_packed is not None:
        raise UserError(
            "save_packed is not possible with model.packed, which is packed already. Give "
            "save_packed=null."
        )
    return settle(config)


def code_version(config: RunConfig) -> str:
    """The version of the code that a cell runs; see `qvlm.records.provenance`."""
    packed = config.model.packed is not None  # nothing of its method runs
    return provenance.code_version(None if packed else method_file(config.method))


def _require_place_of_its_own(config: RunConfig) -> None:
    """Makes sure that the packed model is not written into what the cell reads, or around it.

    Raises:
        UserError: if `save_packed` and such a folder are one, or one lies in the other.
    """
    if config.save_packed is None:
        return
    place = resolve_folder(config.save_packed)
    others = {
        "model.path": checkpoint_folder(config),
        "model.vision_tower": Path(config.model.vision_tower or config.save_packed + "/tower"),
        "data.source": Path(config.data.source),
        "results_dir": config.runs_dir,
    }
    for option, folder in others.items():
        other = resolve_folder(folder)
        if option != "results_dir" and not other.is_dir():
            continue
        if place.is_relative_to(other) or other.is_relative_to(place):
            raise UserError(
                f"save_packed={config.save_packed} is not a folder apart from {option}, whose "
                f"files are in {other}. Give a new or an empty folder elsewhere."
            )


def _hash_files(config: RunConfig) -> dict[str, str]:
    files = {"model": provenance.content_hash(checkpoint_folder(config), CHECKPOINT_FILES)}
    if config.model.vision_tower is not None and config.model.packed is None:
        tower = local_folder(config.model.vision_tower, "model.vision_tower")
        files["vision_tower"] = provenance.content_hash(tower, CHECKPOINT_FILES)
    if config.on_text:
        files["data"] = provenance.content_hash(text_folder(config.data.source), TEXT_FILES)
    elif Path(config.data.source).is_dir():
        files["data"] = provenance.content_hash(Path(config.data.source), DATA_FILES)
    tasks = {"tasks": config.tasks.include_path, "task_data": config.tasks.folder}
    for name, folder in tasks.items():
        if config.tasks.names and folder is not None:
            files[name] = provenance.content_hash(Path(folder), TASK_FILES)
    return files

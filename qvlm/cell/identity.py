"""`Cell`: a configuration that was checked, and what identifies its record.

A record is identified by what its numbers depend on: the part of the configuration that
`influences` keeps, the code version, and the hashes of the files that the cell reads. All of it is
worked out once, by `Cell.of`, and the cell is handed on from the plan of a sweep through its
launcher to the pipeline.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from qvlm.cell.checks import check_options
from qvlm.cell.inputs import checkpoint_folder, settle_answer_length
from qvlm.cell.method import method_file
from qvlm.config.compose import typed
from qvlm.config.schema import RunConfig, canonical, influences
from qvlm.errors import RunError, UserError
from qvlm.models.checkpoints.hub import local_folder
from qvlm.packing import read_origin
from qvlm.records import provenance
from qvlm.records.record import Record, find_record, identify

CHECKPOINT_FILES = (".safetensors", ".bin", ".json", ".model", ".tiktoken")
DATA_FILES = (".parquet", ".json", ".arrow", ".png", ".jpg", ".jpeg")

# The options that a packed checkpoint settles, besides those of the model.
SETTLED = ("method", "method_name", "bits", "quantizer", "calibration")


@dataclass(frozen=True)
class Cell:
    """One cell, and what identifies its record.

    Attributes:
        config: Configuration in its one form; see `resolve`.
        hash: Hash of the three attributes below, 64 hexadecimal digits.
        influences: Part of the configuration that can change a number.
        code: Code version, 64 hexadecimal digits.
        files_hashed: Content hash by what was hashed: "model", and "vision_tower" and "data" if
            they are folders of their own.
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
        config = settle_answer_length(config)
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

        Raises:
            UserError: if the folder holds other files.
        """
        if self.config.save_packed is None:
            return True
        folder = Path(self.config.save_packed)
        if not folder.exists() or not any(folder.iterdir()):
            return False
        if not (folder / "config.json").is_file():
            raise UserError(
                f"save_packed={folder} is not empty and holds no checkpoint. Give a new or an "
                "empty folder."
            )
        try:
            return bool(read_origin(folder)["hash"] == self.hash)
        except (UserError, KeyError):
            return False  # the process that wrote it was killed

    def on(self, device: str) -> "Cell":
        """The same cell on another device, which is not part of its identity."""
        return replace(self, config=replace(self.config, device=device))

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
        UserError: if the packed checkpoint does not say how it was made, or is of another
            version.
    """
    if config.model.packed is None:
        return canonical(config)
    if config.save_packed is not None:
        raise UserError(
            "save_packed is not possible with model.packed, which is packed already. Give "
            "save_packed=null."
        )
    folder = config.model.packed
    try:
        saved = read_origin(folder)["config"]
        settled = {key: saved[key] for key in SETTLED}
        settled["model"] = {**saved["model"], "packed": folder}
        return canonical(
            typed({**asdict(config), **settled, "execution": "packed", "stream": False})
        )
    except (KeyError, TypeError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"model.packed={folder} is not a checkpoint of this version ({reason}). Pack the model "
            "again."
        ) from error


def code_version(config: RunConfig) -> str:
    """The version of the code that a cell runs; see `qvlm.records.provenance`."""
    return provenance.code_version(method_file(config.method))


def _hash_files(config: RunConfig) -> dict[str, str]:
    files = {"model": provenance.content_hash(checkpoint_folder(config), CHECKPOINT_FILES)}
    if config.model.vision_tower is not None and config.model.packed is None:
        tower = local_folder(config.model.vision_tower, "model.vision_tower")
        files["vision_tower"] = provenance.content_hash(tower, CHECKPOINT_FILES)
    if Path(config.data.source).is_dir():
        files["data"] = provenance.content_hash(Path(config.data.source), DATA_FILES)
    return files

"""A packed checkpoint that is written block by block and resumed after a kill.

A block is a decoder layer or a layer of the vision tower. While the checkpoint is incomplete, its
files are in `FOLDER.partial`: a shard for each finished block, and the progress, which holds the
number of finished blocks and the hidden states that the next block starts from. Each file appears
whole or not at all, and a shard appears before the progress that counts it, so a kill loses only
the block that was being quantized. The last step renames the folder to `FOLDER`. The progress
contains the hash of the cell, so a cell never resumes what another one began.
"""

import json
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qvlm.errors import UserError
from qvlm.packing.checkpoint import ORIGIN, add_packed_config
from qvlm.packing.form import Form
from qvlm.packing.layer import PackedLinear
from qvlm.quantization.block import Call
from qvlm.quantization.linear import QuantLinear
from qvlm.records.files import PARTIAL, explained, write_file

PROGRESS = "progress.pt"


class PartialCheckpoint:
    """An incomplete packed checkpoint, new or resumed.

    Args:
        folder: Folder of the complete checkpoint.
        identity: Hash of the cell.
        names: Full names of the blocks, in order.
        device: Device for the hidden states that the next block starts from.
        anew: Whether to delete what was written before instead of resuming it.

    Attributes:
        folder, names: As given.
        partial: Folder of the incomplete checkpoint.
        done: Number of finished blocks.
        calls: Inputs of the next block. They are empty if the model itself has to produce them.
        uncalibrated: Full names of the layers that were quantized without a calibration token.

    Raises:
        UserError: If the folder holds anything but this cell's checkpoint, or cannot be written.
    """

    def __init__(
        self, folder: Path, identity: str, names: Sequence[str], device: str, anew: bool = False
    ) -> None:
        self.folder = folder
        self.partial = folder.with_name(folder.name + PARTIAL)
        self.names = list(names)
        self.done = 0
        self.calls: list[Call] = []
        self.uncalibrated: list[str] = []
        self._identity = identity
        self._forms: dict[str, dict[str, Any]] = {}
        if folder.is_dir() and any(folder.iterdir()) and not (folder / ORIGIN).is_file():
            # `finish` would delete these files.
            raise UserError(
                f"save_packed: {folder} holds no packed checkpoint but other files. Give a new "
                "folder."
            )
        if anew:
            shutil.rmtree(self.partial, ignore_errors=True)
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"save_packed: {self.partial} cannot be written ({error})") from error
        if (self.partial / PROGRESS).is_file():
            self._read(device)
        elif any(file.suffix != PARTIAL for file in self.partial.iterdir()):
            raise UserError(
                f"save_packed: {self.partial} holds other files. Delete it or give another folder."
            )
        else:
            self._write_progress()

    def add_rest(self, model: PreTrainedModel) -> None:
        """Writes the tensors outside of blocks: embeddings, the last norm and the head."""
        inside = tuple(f"{name}." for name in self.names)
        state = {k: v for k, v in model.state_dict().items() if not k.startswith(inside)}
        if model.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        self._write_shard(0, state)

    def add(self, module: nn.Module, calls: list[Call], uncalibrated: list[str]) -> None:
        """Writes the next block, and the progress to resume from.

        Args:
            module: Quantized block. Its layers are packed for writing and then put back.
            calls: Inputs of the block after it.
            uncalibrated: Full names of the layers that were quantized without a calibration token.

        Raises:
            UserError: If a layer has no packed form (the message names it), or the files cannot be
                written.
        """
        name = self.names[self.done]
        layers = {n: part for n, part in module.named_modules() if isinstance(part, QuantLinear)}
        try:
            for child, layer in layers.items():
                packed = PackedLinear.from_quantized(layer)
                self._forms[f"{name}.{child}"] = asdict(packed.form)
                module.set_submodule(child, packed)
            state = {f"{name}.{key}": value for key, value in module.state_dict().items()}
        finally:
            for child, layer in layers.items():
                module.set_submodule(child, layer)
        self._write_shard(self.done + 1, state)
        self.done += 1
        self.calls, self.uncalibrated = calls, list(uncalibrated)
        self._write_progress()

    def restore(self, position: int, module: nn.Module) -> None:
        """Makes a float block the quantized block that was written, equal to the bit.

        Args:
            position: Index of the block in `names`.
            module: The same block of the float model, which is changed in place.
        """
        name, device = self.names[position], next(module.parameters()).device
        state = load_file(self.partial / self._shard(position + 1))
        for full, fields in self._forms.items():
            if not full.startswith(f"{name}."):
                continue
            layer = PackedLinear(Form(**fields), layer_name=full)
            keys = [key for key in state if key.startswith(f"{full}.")]
            layer.load_state_dict({key.removeprefix(f"{full}."): state.pop(key) for key in keys})
            module.set_submodule(full.removeprefix(f"{name}."), layer.to(device).simulated())
        tensors = module.state_dict()
        for key, value in state.items():  # norms, which a method may have changed
            tensors[key.removeprefix(f"{name}.")].copy_(value)

    def finish(self, model: PreTrainedModel, write_encoding: Callable[[Path], None]) -> None:
        """Writes index and configuration, and renames the folder to that of the checkpoint.

        Args:
            model: Model whose configuration is saved.
            write_encoding: Function that writes tokenizer, image processor and `qvlm.json` to a
                folder.
        """
        shards = [self._shard(number) for number in range(len(self.names) + 1)]
        weight_map: dict[str, str] = {}
        size = 0
        for shard in shards:
            with safe_open(self.partial / shard, framework="pt") as opened:
                weight_map |= dict.fromkeys(opened.keys(), shard)
            size += (self.partial / shard).stat().st_size
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (self.partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        add_packed_config(model, self._forms)
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(self.partial)
        model.generation_config.save_pretrained(self.partial)
        write_encoding(self.partial)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.partial.rename(self.folder)
        (self.folder / PROGRESS).unlink()

    def _shard(self, number: int) -> str:
        return f"model-{number + 1:05}-of-{len(self.names) + 1:05}.safetensors"

    def _write_shard(self, number: int, state: dict[str, Tensor]) -> None:
        tensors = {key: value.detach().contiguous() for key, value in state.items()}
        self._write(self._shard(number), lambda file: save_file(tensors, file, {"format": "pt"}))

    def _write_progress(self) -> None:
        progress = {
            "hash": self._identity,
            "done": self.done,
            "calls": self.calls,
            "uncalibrated": self.uncalibrated,
            "forms": self._forms,
        }
        self._write(PROGRESS, lambda file: torch.save(progress, file))

    def _write(self, name: str, write: Callable[[Path], None]) -> None:
        """Writes a file so that it is there whole or not at all."""
        file = self.partial / name
        with explained(f"save_packed: {file}", UserError):
            write_file(file, write)

    def _read(self, device: str) -> None:
        file = self.partial / PROGRESS
        try:
            progress = torch.load(file, map_location=device, weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(f"save_packed: {file} is damaged. Delete {self.partial}.") from error
        if progress["hash"] != self._identity:
            raise UserError(
                f"save_packed: {self.partial} was begun by another cell, or by another version of "
                "the code or the checkpoint. Delete it, add force=true to begin anew, or give "
                "another folder."
            )
        self.done, self.calls = progress["done"], progress["calls"]
        self.uncalibrated, self._forms = progress["uncalibrated"], progress["forms"]

"""A packed checkpoint that is written block by block and resumed after a kill.

A block is a decoder layer or a layer of the vision tower. While the checkpoint is incomplete, its
files are in `FOLDER.partial`: a shard for each finished block, and the progress, which holds the
number of finished blocks and the hidden states that the next block starts from. Each file appears
whole or not at all, and a shard appears before the progress that counts it, so a kill loses only
the block that was being quantized. The last step renames the folder to `FOLDER`. The progress
contains the hash of the cell, so a cell never resumes what another one began.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qvlm.errors import UserError
from qvlm.packing.checkpoint import add_packed_config, in_float32
from qvlm.packing.form import Form
from qvlm.packing.layer import PackedLinear
from qvlm.packing.saving import (
    PROGRESS,
    partial_folder,
    publish,
    require_own,
    resolve_folder,
    writing,
)
from qvlm.packing.simulated import simulated
from qvlm.quantization.calls import Call
from qvlm.quantization.linear import QuantLinear
from qvlm.quantization.precision import wide
from qvlm.records.files import write_file

# Parts of the progress, and the type of each.
_KINDS = {"hash": str, "done": int, "calls": list, "uncalibrated": list, "forms": dict}


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
        UserError: If the folder holds anything but a packed checkpoint, or `FOLDER.partial` holds
            anything but what this cell began.
        RunError: If the folder cannot be written.
    """

    def __init__(
        self, folder: Path, identity: str, names: Sequence[str], device: str, anew: bool = False
    ) -> None:
        require_own(folder, streamed=True)
        self.folder = resolve_folder(folder)
        self.partial = partial_folder(self.folder)
        self.names = list(names)
        self.done = 0
        self.calls: list[Call] = []
        self.uncalibrated: list[str] = []
        self._identity = identity
        self._forms: dict[str, dict[str, Any]] = {}
        with writing(self.partial):
            unfinished = self.partial.is_dir() and not (self.partial / PROGRESS).is_file()
            if self.partial.exists() and (anew or unfinished):
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True, exist_ok=True)
        if (self.partial / PROGRESS).is_file():
            self._read(device)
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
            UserError: If a layer has no packed form. The message names it.
            RunError: If the files cannot be written.
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
            child = full.removeprefix(f"{name}.")
            weight = wide(module.get_parameter(f"{child}.weight"))  # in the type to compute in
            module.set_submodule(child, simulated(layer.to(device), weight.dtype))
        tensors = module.state_dict()
        for key, value in state.items():  # norms, which a method may have changed
            tensors[key.removeprefix(f"{name}.")].copy_(value)

    def finish(self, model: PreTrainedModel, write_encoding: Callable[[Path], None]) -> None:
        """Writes index and configuration, and renames the folder to that of the checkpoint.

        Args:
            model: Model whose configuration is saved.
            write_encoding: Function that writes tokenizer, image processor and `qvlm.json` to a
                folder.

        Raises:
            RunError: If the files cannot be written. What is finished stays, and can be resumed.
        """
        with writing(self.partial):
            self._finish(model, write_encoding)

    def _finish(self, model: PreTrainedModel, write_encoding: Callable[[Path], None]) -> None:
        shards = [self._shard(number) for number in range(len(self.names) + 1)]
        weight_map: dict[str, str] = {}
        size = 0
        for shard in shards:
            with safe_open(self.partial / shard, framework="pt") as opened:
                weight_map |= dict.fromkeys(opened.keys(), shard)
            size += (self.partial / shard).stat().st_size
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_file(self.partial / "model.safetensors.index.json", json.dumps(index, indent=2))
        add_packed_config(model, self._forms)
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(self.partial)
        model.generation_config.save_pretrained(self.partial)
        write_encoding(self.partial)
        publish(self.partial, self.folder)

    def _shard(self, number: int) -> str:
        return f"model-{number + 1:05}-of-{len(self.names) + 1:05}.safetensors"

    def _write_shard(self, number: int, state: dict[str, Tensor]) -> None:
        tensors = {key: in_float32(value.detach()).contiguous() for key, value in state.items()}
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
        with writing(self.partial):
            write_file(self.partial / name, write)

    def _read(self, device: str) -> None:
        file = self.partial / PROGRESS
        remedy = f"Delete {self.partial}, add force=true to begin anew, or give another folder."
        try:
            progress = torch.load(file, map_location=device, weights_only=True)
            self._check(progress)
        except Exception as error:  # damaged bytes raise anything, out of pickle and zip
            raise UserError(f"save_packed: {file} is damaged. {remedy}") from error
        if progress["hash"] != self._identity:
            raise UserError(
                f"save_packed: {self.partial} was begun by another cell, or by another version of "
                f"the code or the checkpoint. {remedy}"
            )
        self.done, self.calls = progress["done"], progress["calls"]
        self.uncalibrated, self._forms = progress["uncalibrated"], progress["forms"]
        for number in range(self.done + 1 if self.done else 0):
            shard = self.partial / self._shard(number)
            try:
                with safe_open(shard, framework="pt"):  # which compares its size with its header
                    pass
            except (OSError, SafetensorError) as error:
                raise UserError(f"save_packed: {shard} is missing or damaged. {remedy}") from error

    def _check(self, progress: Any) -> None:
        """Makes sure that a progress has the form in which it is written.

        Raises:
            ValueError, TypeError: If it does not.
        """
        if not isinstance(progress, dict) or progress.keys() != _KINDS.keys():
            raise ValueError("its keys are other ones")
        for key, kind in _KINDS.items():
            if type(progress[key]) is not kind:
                raise ValueError(f"{key} is not of the kind {kind.__name__}")
        if progress["hash"] == self._identity and not 0 <= progress["done"] <= len(self.names):
            raise ValueError("it has more blocks than the model")
        if not all(isinstance(name, str) for name in progress["uncalibrated"]):
            raise ValueError("uncalibrated are not names")
        for args, kwargs in progress["calls"]:
            if not isinstance(args, tuple) or not isinstance(kwargs, dict):
                raise ValueError("calls are not arguments")
        for name, fields in progress["forms"].items():
            if not isinstance(name, str):
                raise ValueError("forms have no names")
            Form(**fields)

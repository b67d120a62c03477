"""A packed checkpoint that is written block by block, and gone on with after a kill.

While it is written everything is in `FOLDER.partial`: a shard per finished block, and the
progress, which is how many there are and the hidden states to go on from. Each file appears whole
or not at all, the shard before the progress that counts it, so a kill loses the block under way and
nothing else. The last step gives the folder its name. The progress carries the cell's hash: what
another cell began is never gone on with.
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
from qvlm.packing.checkpoint import ORIGIN, describe
from qvlm.packing.layer import Form, PackedLinear
from qvlm.quantization.block import Call
from qvlm.quantization.linear import QuantLinear
from qvlm.records.files import PARTIAL, explained, write_file

PROGRESS = "progress.pt"


class PackedStream:
    """Where the packed blocks of a model go.

    Args:
        folder: of the checkpoint, once it is whole.
        identity: the cell's hash.
        names: full names of the blocks, in order.
        device: for the hidden states to go on from.
        anew: begin from nothing, whatever there is.

    Attributes:
        done: how many blocks are written.
        calls: of the block after them; empty where the model itself has to produce them.
        uncalibrated: of the walk so far.

    Raises:
        UserError: if another cell, or nobody we know, has written there, or the disk refuses.
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
            # It would be replaced as a whole.
            raise UserError(
                f"save_packed: {folder} holds no packed checkpoint but other files; give a new one"
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
                f"save_packed: {self.partial} holds other files; delete it or give another folder"
            )
        else:
            self._write_progress()

    def add_rest(self, model: PreTrainedModel) -> None:
        """Writes what is in no block: embeddings, the last norm, the head."""
        inside = tuple(f"{name}." for name in self.names)
        state = {k: v for k, v in model.state_dict().items() if not k.startswith(inside)}
        if model.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        self._write_shard(0, state)

    def add(self, module: nn.Module, calls: list[Call], uncalibrated: list[str]) -> None:
        """Writes the next block, and what to go on from.

        Args:
            module: the block, quantized; it is left as it is.
            calls: of the block after it.

        Raises:
            UserError: naming the layer, if one has no packed form.
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
        """Makes of a float block the quantized one that was written, equal to the bit."""
        name, device = self.names[position], next(module.parameters()).device
        state = load_file(self.partial / self._shard(position + 1))
        for full, fields in self._forms.items():
            if not full.startswith(f"{name}."):
                continue
            layer = PackedLinear(Form(**fields), layer_name=full)
            keys = [key for key in state if key.startswith(f"{full}.")]
            layer.load_state_dict({key.removeprefix(f"{full}."): state.pop(key) for key in keys})
            module.set_submodule(full.removeprefix(f"{name}."), layer.to(device).simulated())
        places = module.state_dict()
        for key, value in state.items():  # norms, which a method may have changed
            places[key.removeprefix(f"{name}.")].copy_(value)

    def finish(self, model: PreTrainedModel, write_encoding: Callable[[Path], None]) -> None:
        """Writes what makes shards a checkpoint, and gives the folder its name.

        Args:
            model: for its configuration.
            write_encoding: writes the remaining files to a folder.
        """
        shards = [self._shard(number) for number in range(len(self.names) + 1)]
        placed: dict[str, str] = {}
        size = 0
        for shard in shards:
            with safe_open(self.partial / shard, framework="pt") as opened:
                placed |= dict.fromkeys(opened.keys(), shard)
            size += (self.partial / shard).stat().st_size
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        (self.partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        describe(model, self._forms)
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
            raise UserError(f"save_packed: {file} is damaged; delete {self.partial}") from error
        if progress["hash"] != self._identity:
            raise UserError(
                f"save_packed: {self.partial} was begun by another cell, or by another version of "
                "the code or the checkpoint; delete it, add force=true to begin anew, or give "
                "another folder"
            )
        self.done, self.calls = progress["done"], progress["calls"]
        self.uncalibrated, self._forms = progress["uncalibrated"], progress["forms"]

"""Quantizes a model larger than memory, one decoder layer at a time, into a packed checkpoint.

First everything but the decoder layers is in memory, and the vision tower and the projector are
quantized as in any walk. Then the inputs of the language model are caught and all of that is
dropped. From there on one decoder layer is read, quantized, run, packed and written before the
next, and only the hidden states of the calibration problems stay in memory beside it. The result
equals that of packing in memory, to the bit.

A method that needs the whole model, or several layers at once, cannot be streamed: Q-VLM tunes the
vision tower through the language model. A method that looks at the float model first can be, as
Q-VLM does to mine dependencies: the stream is then read twice.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from qvlm.cell import inputs
from qvlm.cell.findings import Quantized
from qvlm.cell.identity import Cell
from qvlm.cell.material import calibration_batches
from qvlm.cell.method import not_streamable
from qvlm.cell.origin import describe_origin, quantized_by
from qvlm.cell.walk import ProgressWalk
from qvlm.methods.base import Method
from qvlm.models.loaded import LoadedModel
from qvlm.models.meta import materialize
from qvlm.models.packed import save_encoding
from qvlm.packing import PartialCheckpoint, read_origin
from qvlm.quantization import Block, QuantizationConfig, expected_layers
from qvlm.quantization.calls import Call, advance
from qvlm.quantization.targets import block_layers, quantizable
from qvlm.runtime.stages import Stages


class StreamedWalk(ProgressWalk):
    """A walk that reads each decoder layer when it comes to it, and writes it once it is quantized.

    It begins after the last block that the stream holds.

    Args:
        loaded: Model whose decoder layers are on the meta device.
        batches: Calibration batches; see `Walk`.
        quantization: Which tensors are quantized how.
        stream: Packed checkpoint that is being written, of the same model.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        batches: Sequence[Mapping[str, Tensor]],
        quantization: QuantizationConfig,
        stream: PartialCheckpoint,
    ) -> None:
        super().__init__(loaded.model, batches, quantization)
        assert loaded.tensors is not None
        self.tensors = loaded.tensors
        self.tensors.close()  # tower and projector are in memory; mapped pages would count twice
        self.device = str(loaded.model.device)
        self.stream = stream
        self.finished = stream.done
        self.uncalibrated = list(stream.uncalibrated)

    def survey(self) -> Iterator[Block]:
        """Yields the float blocks, and keeps no decoder layer but the one at hand.

        Embeddings, tower and projector stay in memory, because `blocks` needs them again.
        """
        calls: list[Call] = []
        for position, name in enumerate(self.names):
            kind, module = self._layers[name]
            if self._is_entry(name):
                calls = self._catch(name)
            if kind == "language":
                materialize(module, name, self.tensors, self.device)
                self.tensors.close()
            block = self._block({name: module}, kind, calls)
            yield block
            block.close()
            following = self.names[position + 1 :][:1]
            calls = advance(module, calls) if following and not self._is_entry(following[0]) else []
            if kind == "language":
                module.to("meta")

    def _visit(self, runs: Sequence[Sequence[str]]) -> Iterator[Block]:
        if any(len(run) > 1 for run in runs):
            raise not_streamable("the method")
        self._resume()
        calls = self.stream.calls
        for name in self.names[self.stream.done :]:
            kind, module = self._layers[name]
            if self._is_entry(name):
                calls = self._catch(name)
            if kind == "language":
                self.model.to("meta")  # only the hidden states are needed from here on
                materialize(module, name, self.tensors, self.device)
                self.tensors.close()
            block = self._block({name: module}, kind, calls)
            yield block
            block.close()
            if quantizable(module):  # the method left the block as it was
                raise not_streamable("the method")
            following = self.names[self.stream.done + 1 :][:1]
            if following and not self._is_entry(following[0]):
                calls = advance(module, calls)
            else:
                calls = []
            self.stream.add(module, calls, self.uncalibrated)

    def _resume(self) -> None:
        """Restores the blocks that the stream holds, if the rest of the walk runs them again."""
        done = self.stream.done
        if done == 0:
            self.stream.add_rest(self.model)
        if all(self._layers[name][0] != "language" for name in self.names[:done]):
            for position, name in enumerate(self.names[:done]):
                self.stream.restore(position, self._layers[name][1])


def stream_cell(cell: Cell, method: Method, device: str, stages: Stages) -> Quantized:
    """Writes a cell's packed model to `save_packed`, resumes it, or finds it there.

    Args:
        cell: Cell with stream=true.
        method: Method of the cell.
        device: Device to quantize on.
        stages: Stages of the cell. Two are added, "calibrate" and "quantize", unless the model is
            found.

    Raises:
        UserError: if checkpoint, data or folder cannot be used, or the method cannot be streamed.
        RunError: if something broke on the way.
    """
    folder = Path(str(cell.config.save_packed))
    if not cell.is_saved():
        _quantize(cell, method, device, folder, stages)
    return quantized_by(read_origin(folder))


def _quantize(cell: Cell, method: Method, device: str, folder: Path, stages: Stages) -> None:
    config = cell.config
    quantization = inputs.quantization_config(config)
    with stages.stage("calibrate"):
        loaded = inputs.load_for_streaming(config, device)
        batches, ids = calibration_batches(config, loaded)
    with stages.stage("quantize"):
        expected = expected_layers(loaded.model, quantization.vision_tower)
        names = list(block_layers(loaded.model, quantization.vision_tower))
        stream = PartialCheckpoint(folder, cell.hash, names, device, config.force)
        walk = StreamedWalk(loaded, batches, quantization, stream)
        report = method.quantize(walk)
        if walk.finished:  # what the method reported of those blocks is lost
            report = replace(report, details={**report.details, "resumed_blocks": walk.finished})
        quantized = Quantized(report, ids, list(walk.uncalibrated))
        origin = describe_origin(cell, loaded, method.name, expected, quantized)
        stream.finish(loaded.model, partial(save_encoding, loaded, origin=origin))

"""Quantizes a model larger than memory, a decoder layer at a time, into a packed checkpoint.

First everything but the decoder layers is in memory, and the vision tower and the projector are
quantized as in any walk. Then the language model's inputs are caught and all that is dropped: from
there on one decoder layer is read, quantized, run, packed and written before the next, and beside
it are the hidden states of the calibration problems. The result is that of packing in memory, to
the bit.

What has to see a layer twice, or several together, cannot be streamed: Q-VLM looks for dependencies
in the float model before it quantizes, and tunes the vision tower through the language model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from qvlm.cell import inputs as prepare
from qvlm.config.schema import RunConfig
from qvlm.methods.base import Method, MethodReport
from qvlm.models.load import LoadedModel, save_encoding
from qvlm.models.meta import fill
from qvlm.packing import PackedStream, read_origin
from qvlm.quantization import Block, QuantizationConfig, batch_by_length, expected_layers
from qvlm.quantization.block import advance
from qvlm.quantization.targets import block_layers, quantizable
from qvlm.records.record import plain
from qvlm.runtime.stages import ShownWalk, Stages


class StreamedWalk(ShownWalk):
    """A walk over a hollow model that begins where its stream ends, and adds every block to it.

    Args:
        loaded: hollow.
        batches, quantization: see `Walk`.
        stream: of the same model.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        batches: Sequence[Mapping[str, Tensor]],
        quantization: QuantizationConfig,
        stream: PackedStream,
    ) -> None:
        super().__init__(loaded.model, batches, quantization)
        assert loaded.tensors is not None
        self.tensors = loaded.tensors
        self.tensors.close()  # what is read is in memory, and mapped pages are counted as well
        self.device = str(loaded.model.device)
        self.stream = stream
        self.finished = stream.done
        self.uncalibrated = list(stream.uncalibrated)

    def _visit(self, runs: Sequence[Sequence[str]]) -> Iterator[Block]:
        if any(len(run) > 1 for run in runs):
            raise prepare.not_streamed("the method")
        self._resume()
        inputs = self.stream.calls
        for name in self.names[self.stream.done :]:
            kind, module = self._layers[name]
            if self._is_entry(name):
                inputs = self._catch(name)
            if kind == "language":
                self.model.to("meta")  # nothing but the inputs is needed any more
                fill(module, name, self.tensors, self.device)
                self.tensors.close()
            block = Block({name: module}, kind, inputs, self.quantization, self.uncalibrated)
            yield block
            block.close()
            if quantizable(module):  # it only looked
                raise prepare.not_streamed("the method")
            following = self.names[self.stream.done + 1 :][:1]
            if following and not self._is_entry(following[0]):
                inputs = advance(module, inputs)
            else:
                inputs = []
            self.stream.add(module, inputs, self.uncalibrated)

    def _resume(self) -> None:
        """Brings the model to where the stream ends, if what is before it will run again."""
        done = self.stream.done
        if done == 0:
            self.stream.add_rest(self.model)
        if all(self._layers[name][0] != "language" for name in self.names[:done]):
            for position, name in enumerate(self.names[:done]):
                self.stream.restore(position, self._layers[name][1])


def stream_cell(
    config: RunConfig, method: Method, device: str, identity: str, stages: Stages
) -> dict[str, Any]:
    """Writes a cell's packed model to `save_packed`, or goes on with it, or finds it there.

    Args:
        identity: the cell's hash.

    Returns:
        What a record says of it: `report`, `calibration_ids`, `uncalibrated`.

    Raises:
        UserError: if checkpoint, data or folder cannot be used, or the method cannot be streamed.
        RunError: if something broke on the way.
    """
    folder = Path(str(config.save_packed))
    if config.force or not prepare.is_saved(config, {"hash": identity}):
        _quantize(config, method, device, identity, folder, stages)
    origin = read_origin(folder)
    return {
        "report": MethodReport(**origin["report"]),
        "calibration_ids": origin["calibration_ids"],
        "uncalibrated": origin["uncalibrated"],
    }


def _quantize(
    config: RunConfig, method: Method, device: str, identity: str, folder: Path, stages: Stages
) -> None:
    quantization = prepare.quantization_config(config)
    with stages.stage("calibrate"):
        loaded = prepare.load(config, device)
        samples, ids = prepare.draw_calibration(config)
        batches = batch_by_length(loaded, samples, config.calibration.batch_size)
    with stages.stage("quantize"):
        expected = expected_layers(loaded.model, quantization.vision_tower)
        names = list(block_layers(loaded.model, quantization.vision_tower))
        stream = PackedStream(folder, identity, names, device, config.force)
        walk = StreamedWalk(loaded, batches, quantization, stream)
        report = method.quantize(walk)
        if walk.finished:  # what an earlier process found is not known here
            report = replace(report, details={**report.details, "resumed_blocks": walk.finished})
        origin = {
            "config": asdict(config),
            "expected": expected,
            "hash": identity,
            "calibration_ids": ids,
            "uncalibrated": list(walk.uncalibrated),
            "report": plain(asdict(report)),
        }
        stream.finish(loaded.model, partial(save_encoding, loaded, origin=origin))

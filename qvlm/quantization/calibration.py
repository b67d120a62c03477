"""The calibration walk: visits a model block by block, with the activations of one block in memory.

The inputs of the first block are caught where the model itself computes them: a hook stops the
forward pass there. A method then quantizes the block in place, the walk runs it, and its outputs
become the inputs of the next block. So a block reads what it will read when everything before it is
quantized (X_q in the papers).

The order is vision layers, projector, decoder layers. At the projector and at the first decoder
layer the walk runs the model up to there once more. That costs another pass of the vision tower and
leaves feature selection, placement of image features, masks and positions to the model's own code.

A block is valid until the next one is asked for. `survey` walks over the float model, and `blocks`
can be called after it, so a method may look first and quantize later.

A model that a table lists (`qvlm.families`) is watched first, so that each layer gets the arguments
that the model gives it (see `tracing`). Any other model, of which only one layer may be in memory,
is not, and is refused if its decoder layers differ in their attention.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qvlm import validation
from qvlm.errors import RunError, UserError
from qvlm.quantization.block import Block
from qvlm.quantization.calls import Call, advance
from qvlm.quantization.experts import unfuse_experts
from qvlm.quantization.first_token import FirstToken
from qvlm.quantization.hooks import hooked
from qvlm.quantization.ranges import check_group_size
from qvlm.quantization.spec import QuantizationConfig
from qvlm.quantization.targets import block_layers, listed, quantizable
from qvlm.quantization.tracing import Caught, Trace, trace

# Largest number of image tokens that are merged into one call, which bounds memory.
_TOKENS = 4096


class Walk:
    """A model, the data to calibrate it with, and the specs of its tensors.

    The constructor takes fused experts apart, so that their linears can be visited.

    Args:
        model: LLaVA in evaluation mode. Methods quantize it in place.
        batches: Keyword arguments of the model's forward, each with rows of equal length (see
            `batch_by_length`).
        quantization: Spec of each kind of tensor.

    Attributes:
        uncalibrated: Full names of the layers that were quantized without a calibration token.

    Raises:
        UserError: If the calibration set is empty, the group size does not divide the input of a
            layer, or the decoder layers differ in their attention.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Tensor]],
        quantization: QuantizationConfig,
    ) -> None:
        if not batches:
            raise UserError("the calibration set is empty: at least one problem is needed")
        self._table = listed(model)
        self._check_attention(model, quantization.first_token)
        unfuse_experts(model)
        self.model = model
        self.batches = list(batches)
        self.quantization = quantization
        self.uncalibrated: list[str] = []
        self._layers = block_layers(model, quantization.vision_tower)
        self._first_token = None
        if quantization.first_token == "float":
            decoder = {n: layer for n, (kind, layer) in self._layers.items() if kind == "language"}
            self._first_token = FirstToken(decoder)
        for name, (kind, module) in self._layers.items():
            spec = quantization.weights(kind)
            for linear_name, linear in quantizable(module).items():
                check_group_size(linear.in_features, spec, f"{name}.{linear_name}")
                if kind != "vision" and "experts" in linear_name.split("."):
                    self._check_expert(f"{name}.{linear_name}")

    @property
    def names(self) -> list[str]:
        """The full names of the layers that `blocks` visits, in order."""
        return list(self._layers)

    def blocks(self, partition: Sequence[Sequence[str]] | None = None) -> Iterator[Block]:
        """Yields the blocks in order, and runs each as the method left it to get to the next.

        Args:
            partition: Names of the layers of each block: consecutive layers of one kind, which
                together are `names` in order. By default each layer is a block.

        Raises:
            UserError: If the partition is not of this form.
        """
        if partition is None:
            partition = [[name] for name in self._layers]
        self._check_partition(partition)
        return self._visit(partition)

    def survey(self) -> Iterator[Block]:
        """Yields the blocks of the float model in order, for a method that looks first.

        Nothing may be replaced, and `blocks` has not been called before. A stream can be surveyed
        as often as one likes; each survey reads the decoder layers once.
        """
        return self.blocks()

    def _visit(self, partition: Sequence[Sequence[str]]) -> Iterator[Block]:
        inputs: list[Call] = []
        traced = Trace()
        for position, names in enumerate(partition):
            kind = self._layers[names[0]][0]
            if self._is_entry(names[0]):
                traced = self._trace(kind)
                inputs = self._catch(names[0])
                if kind != "language" and traced.alike(traced.calls):
                    inputs = _in_large_batches(inputs)
            elif names[0] in traced.joins:
                inputs = self._catch(names[0])
            else:
                inputs = traced.own(names[0], inputs)
            traced.require_alike(names)
            following = partition[position + 1 :][:1]
            last = not following or self._is_entry(following[0][0])
            layers = {name: self._layers[name][1] for name in names}
            block = self._block(layers, kind, inputs)
            yield block
            block.close()
            inputs = [] if last else advance(block.module, inputs)

    def _block(self, layers: Mapping[str, nn.Module], kind: str, inputs: list[Call]) -> Block:
        return Block(layers, kind, inputs, self.quantization, self.uncalibrated, self._first_token)

    def _is_entry(self, name: str) -> bool:
        """Whether the layer is the first of its kind, or a part of the projector."""
        kind = self._layers[name][0]
        return (
            kind == "projector"
            or next(other for other, (k, _) in self._layers.items() if k == kind) == name
        )

    def _check_partition(self, partition: Sequence[Sequence[str]]) -> None:
        for names in partition:
            kinds = {self._layers[name][0] for name in names if name in self._layers}
            if len(kinds) != 1:
                raise UserError(f"a block must hold layers of one kind: got {list(names)}")
        covered = [name for names in partition for name in names]
        if covered != self.names:
            missing = [name for name in self.names if name not in covered]
            raise UserError(
                "the blocks must cover all layers once and in order: "
                + (f"{missing[0]} is missing" if missing else "their order or number differs")
            )

    def _check_attention(self, model: nn.Module, first_token: str) -> None:
        config = getattr(model, "config", None)
        text_config = None if config is None else config.get_text_config()
        several = len(set(getattr(text_config, "layer_types", None) or [])) > 1
        if several and self._table is None:
            raise UserError("the decoder layers are not all of one attention type")
        if self._table is not None and self._table.own_positions and first_token == "float":
            raise UserError(
                f"first_token=float is not possible with {self._table.title}, which counts "
                "positions in its own way. Give first_token=quantized."
            )

    def _check_expert(self, name: str) -> None:
        """Refuses ranges of a prompt where the tokens that arrive are of no one prompt.

        While decoding, an expert reads a single token, whose range holds nothing but itself.
        """
        if self.quantization.language.granularity == "per_channel_prompt":
            raise UserError(
                f"granularity=per_channel_prompt is not possible for {name}, an expert, which "
                "reads tokens and not prompts. Choose one of: per_channel, per_channel_group, "
                "per_tensor, per_token"
            )

    def _batches_for(self, kind: str) -> list[Mapping[str, Tensor]]:
        """The batches that reach a kind of layers: only those with images reach the tower."""
        language = kind == "language"
        return [each for each in self.batches if language or each.get("pixel_values") is not None]

    def _trace(self, kind: str) -> Trace:
        """Watches how the model, as it is now, calls the layers of a kind."""
        if self._table is None or kind == "projector":
            return Trace()
        layers = {name: layer for name, (of, layer) in self._layers.items() if of == kind}
        return trace(self.model, layers, self._batches_for(kind))

    def _catch(self, name: str) -> list[Call]:
        """Collects the calls of a layer while the model, as it is now, runs on the batches."""
        kind, layer = self._layers[name]
        caught: list[Call] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append((args, kwargs))
            raise Caught

        with hooked({layer: stop}, with_kwargs=True):
            for batch in self._batches_for(kind):
                try:
                    with torch.no_grad():
                        self.model(**batch, use_cache=False)
                except Caught:
                    continue
                raise RunError(f"the model's forward pass does not reach {name}")
        return caught


def _in_large_batches(calls: Sequence[Call]) -> list[Call]:
    """Merges the calls of images, whose length does not depend on that of their texts."""
    merged: list[Call] = []
    for (images, *more), kwargs in calls:
        options = [*more, *kwargs.values()]
        if merged and not any(isinstance(option, Tensor) for option in options):
            (before, *same), others = merged[-1]
            alike = before.shape[1:] == images.shape[1:] and (same, others) == (more, kwargs)
            tokens = (len(before) + len(images)) * images.shape[1:-1].numel()
            if alike and tokens <= _TOKENS:
                merged[-1] = (torch.cat([before, images]), *more), kwargs
                continue
        merged.append(((images, *more), kwargs))
    return merged


class Encodes(Protocol):
    """An object that turns problems into a batch, such as a loaded model."""

    def encode(
        self, problems: Sequence[Mapping[str, Any]], with_target: bool = False
    ) -> dict[str, Tensor]: ...


def batch_by_length(
    loaded_model: Encodes, problems: Sequence[Mapping[str, Any]], batch_size: int
) -> list[dict[str, Tensor]]:
    """Encodes prompt and target of each problem, in batches that need no padding.

    Calibration would count padding tokens like any others. Problems are therefore batched with
    those whose tensors have the same shapes, but for their first dimension: with texts of the same
    length, and with or without an image. Batches are in the order in which their shapes first
    occur.

    Args:
        loaded_model: Object whose `encode` turns problems into a batch.
        problems: Problems, one per row of a batch.
        batch_size: Largest number of rows of a batch.

    Returns:
        Batches, each with tensors whose first dimension is its rows.

    Raises:
        UserError: If there is no problem, or the batch size is below 1.
    """
    if not len(problems):
        raise UserError("the calibration set is empty: at least one problem is needed")
    validation.whole_number("calibration.batch_size", batch_size)
    alike: dict[tuple[Any, ...], list[dict[str, Tensor]]] = {}
    for problem in problems:
        row = loaded_model.encode([problem], with_target=True)
        shapes = tuple((key, tensor.shape[1:]) for key, tensor in sorted(row.items()))
        alike.setdefault(shapes, []).append(row)
    return [
        {key: torch.cat([row[key] for row in rows[start : start + batch_size]]) for key in rows[0]}
        for rows in alike.values()
        for start in range(0, len(rows), batch_size)
    ]

"""Visual encoder optimization: fine-tunes the vision tower so that rounding costs less.

Q-VLM (arXiv 2410.08119), section 3.3. Quantization is simulated in the whole model, and everything
but the vision tower is fixed. The tower is fine-tuned on the image-text pairs of the calibration
set to minimize eq. (10), which is in `vision_loss.py`.

Rounding has a straight-through gradient, and grids are constants, in the dependencies too. The
parameters are those of the tower's layers (weights and biases of linears and norms) that are
float32 or float64: in a model of 16 bits the quantized linears, whose float weights are copies in
float32. Tuned parameters are rounded to float32, so that any machine goes on from the same tower
(see `qvlm.quantization.precision`). The released code contains no training; it tries the ratios 1,
0.999 and 0.998 for the tower's ranges.

Gradients pass through the whole language model. With `Tuning.checkpointing` a layer keeps its input
alone and is computed again in the backward pass (T. Chen et al., arXiv 1604.06174), so that the
activations of one layer are in memory at a time. In float16 the loss is scaled, so that gradients
do not vanish (P. Micikevicius et al., arXiv 1710.03740).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import cos, isfinite, pi
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from qvlm.errors import RunError, UserError
from qvlm.methods.qvlm.dependency import Joint
from qvlm.methods.qvlm.vision_loss import (
    Batch,
    Layers,
    Reference,
    Tuning,
    jacobian_norms,
    loss_terms,
)
from qvlm.quantization.precision import HALF, settled
from qvlm.quantization.targets import decoder_layers, vision_layers


def with_images(batches: Sequence[Batch]) -> list[Batch]:
    """The batches that contain images.

    Raises:
        UserError: If there is none.
    """
    found = [batch for batch in batches if batch.get("pixel_values") is not None]
    if not found:
        raise UserError(
            "method.veo=true is not possible: the calibration set contains no image. "
            "Choose calibration problems with images, or method.veo=false"
        )
    return found


def fine_tune(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    references: Sequence[Reference],
    layers: Layers,
    joint: Joint,
    tuning: Tuning,
) -> dict[str, Any]:
    """Fine-tunes the vision tower of a model with simulated quantization, in place.

    Args:
        model: Model with simulated quantization.
        batches: Batches with images. Each is one forward pass; a step consists of as many as it
            takes to reach `tuning.batch_size` pairs.
        references: Results of the float model for each batch.
        layers: Layers of the tower whose dependencies L_ent sums.
        joint: Joint distribution of two activations, which defines their dependency.
        tuning: Options.

    Returns:
        Entries for the record: the Jacobian norms, and the mean of each term in every epoch.

    Raises:
        RunError: If the loss is not finite.
    """
    half = next((p.dtype for p in model.parameters() if p.dtype in HALF), None)
    again = half is not None if tuning.checkpointing is None else tuning.checkpointing
    scaler = torch.amp.GradScaler(model.device.type, enabled=half == torch.float16)
    with _only_tower_trains(model) as parameters, computed_again(model, again):
        jacobians = dict.fromkeys(layers, 0.0)
        if tuning.entropy:
            factor = scaler.get_scale() if scaler.is_enabled() else 1.0
            jacobians = jacobian_norms(model, batches, references, layers, factor)
        steps = schedule([len(batch["input_ids"]) for batch in batches], tuning)
        optimizer = torch.optim.Adam(parameters, lr=tuning.learning_rate)
        history: list[dict[str, float]] = []
        for position, (epoch, step) in enumerate(steps):
            pairs = sum(len(batches[index]["input_ids"]) for index in step)
            if epoch == len(history):
                history.append(dict.fromkeys(("regression", "entropy", "error", "total"), 0.0))
            for index in step:
                batch = batches[index]
                terms = loss_terms(
                    model, batch, references[index], layers, jacobians, joint, tuning
                )
                share = len(batch["input_ids"]) / pairs
                if not isfinite(terms.total.item()):
                    raise RunError("the loss of the visual encoder optimization is not finite")
                scaler.scale(terms.total * share).backward()
                for name in history[-1]:
                    history[-1][name] += getattr(terms, name).item() * len(batch["input_ids"])
            for group in optimizer.param_groups:
                group["lr"] = tuning.learning_rate * 0.5 * (1 + cos(pi * position / len(steps)))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(settled(parameter))
    count = sum(len(batch["input_ids"]) for batch in batches)
    return {
        "pairs": count,
        "steps": len(steps),
        "jacobian_norms": jacobians,
        "losses": [{name: value / count for name, value in sums.items()} for sums in history],
    }


@contextmanager
def computed_again(model: PreTrainedModel, active: bool = True) -> Iterator[None]:
    """Makes each layer of tower and language model keep its input alone for the backward pass.

    Args:
        model: Model whose gradients are going to be computed.
        active: Whether it does anything.
    """
    layers = [*vision_layers(model).values(), *decoder_layers(model).values()] if active else []
    before = [(layer, layer.__dict__.get("forward")) for layer in layers]
    for layer in layers:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for layer, own in before:
            del layer.forward
            if own is not None:
                layer.forward = own


@contextmanager
def _only_tower_trains(model: PreTrainedModel) -> Iterator[list[nn.Parameter]]:
    """Makes the parameters of the tower's layers the only trainable ones, and yields them."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    tower = [
        parameter
        for layer in vision_layers(model).values()
        for parameter in layer.parameters()
        if parameter.dtype in (torch.float32, torch.float64)
    ]
    if not tower:
        raise UserError(
            "method.veo=true is not possible: the vision tower is not in float32 or float64. "
            "Choose model.dtype=float32, or method.veo=false"
        )
    try:
        for parameter in tower:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield tower
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


def schedule(sizes: Sequence[int], tuning: Tuning) -> list[tuple[int, list[int]]]:
    """Draws the steps: batches in random order, as many per step as it takes to have enough pairs.

    Args:
        sizes: Number of pairs of each batch.
        tuning: Number of epochs, pairs per step, and seed.

    Returns:
        Epoch of each step, and the indices of its batches.
    """
    random = torch.Generator().manual_seed(tuning.seed)
    steps: list[tuple[int, list[int]]] = []
    for epoch in range(tuning.epochs):
        step: list[int] = []
        for index in torch.randperm(len(sizes), generator=random).tolist():
            step.append(index)
            if sum(sizes[i] for i in step) >= tuning.batch_size:
                steps.append((epoch, step))
                step = []
        if step:
            steps.append((epoch, step))
    return steps

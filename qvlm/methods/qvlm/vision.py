"""Visual encoder optimisation: the vision tower learns to live with the rounding.

Q-VLM (arXiv 2410.08119), section 3.3. With quantization simulated everywhere and everything but the
vision tower fixed, the tower is fine-tuned on the image-text pairs of the calibration set to
minimise (eq. 10)

    L = L_reg + lambda_1 L_ent + lambda_2 L_err.

- L_reg, the autoregressive loss: cross-entropy of each next token.
- L_ent = sum_k J_k D(k, k + 1) over the tower's layers (eq. 8, 9): lowering the dependency of
  consecutive layers, most where it matters. J_k is the norm of the Jacobian of the final error,
  d ||Xn_q - Xn_r|| / d X_k, over the calibration set. It needs a backward pass per batch, changes
  slowly, and is therefore computed once, with the rounding that fine-tuning starts from, scaled to
  sum to one (so that L_ent is a mean entropy in nats), and reused in every step.
- L_err = ||Xv_q - Xv_r|| + eta ||Xn_q - Xn_r||: the vision features that the projector reads, and
  what the output head reads, against the float model's. The norms are relative to those of the
  float features of the same row, so that weights carry over between models.

Rounding has a straight-through gradient and grids are constants, in D too. The parameters are those
of the tower's layers (weights and biases of linears and norms) that are float32.

Calibration batches do not say where the question ends and the answer begins. Unless a batch brings
`labels` (-100: no loss), a token of text counts in L_reg by the probability that the float model
gives it, which is nearly nothing for questions if it was tuned on answers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import cos, isfinite, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from qvlm.errors import RunError, UserError
from qvlm.methods.qvlm.dependency import Activation, Joint, conditional_entropy
from qvlm.methods.qvlm.options import check_number, check_whole
from qvlm.quantization import Quantizer, QuantLinear, UniformQuantizer, Walk
from qvlm.quantization.targets import projector, vision_layers

Batch = Mapping[str, Tensor]
Layers = Mapping[str, tuple[nn.Module, Quantizer]]
"""By name: a layer and the quantizer of its input."""

IGNORED = -100
# Elements of the assignments [tokens, features, M] of one layer that a batch computes. A joint
# distribution of M^2 numbers needs no more, and L_ent would cost more than the model otherwise.
_PIECE = 2**18


@dataclass(frozen=True)
class Tuning:
    """How the tower is fine-tuned; a term of weight 0 is not computed.

    Args:
        epochs: passes over the pairs.
        batch_size: pairs per step.
        learning_rate: of Adam; decays to zero along a cosine.
        regression: weight of L_reg.
        entropy: lambda_1, the weight of L_ent.
        error: lambda_2, the weight of L_err.
        eta: the share of the model's output in L_err.
        seed: of the order of the batches.

    Raises:
        UserError: naming the option and what it accepts.
    """

    epochs: int = 10
    batch_size: int = 8
    learning_rate: float = 1e-4
    regression: float = 1.0
    entropy: float = 0.1
    error: float = 1.0
    eta: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            check_whole(f"veo_{name}", getattr(self, name))
        for name in ("learning_rate", "regression", "entropy", "error", "eta"):
            check_number(f"veo_{name}", getattr(self, name))
        check_whole("seed", self.seed, least=0)


@dataclass(frozen=True)
class Reference:
    """What the float model makes of a batch.

    Attributes:
        vision: the features that the projector reads, [images, patches, width].
        final: what the output head reads, [rows, tokens, width].
        trust: weight of each next token in L_reg, [rows, tokens - 1].
    """

    vision: Tensor
    final: Tensor
    trust: Tensor


@dataclass(frozen=True)
class Terms:
    """The loss of a batch: its three terms, without their weights, and the weighted sum."""

    regression: Tensor
    entropy: Tensor
    error: Tensor
    total: Tensor


def with_images(batches: Sequence[Batch]) -> list[Batch]:
    """The batches that hold images.

    Raises:
        UserError: if none does.
    """
    found = [batch for batch in batches if batch.get("pixel_values") is not None]
    if not found:
        raise UserError(
            "method.veo=True: the calibration set holds no image; accepted are calibration "
            "problems with images, or method.veo=false"
        )
    return found


@torch.no_grad()
def reference(model: PreTrainedModel, batch: Batch) -> Reference:
    """Runs the model, which is still in floating point, on a batch with images."""
    with _observed(model, {}) as seen:
        logits = _logits(model, batch)
    if "labels" in batch:
        trust = (batch["labels"][:, 1:] != IGNORED).to(logits.dtype)
    else:
        following = _next_tokens(model, batch)
        known = following.clamp_min(0).unsqueeze(-1)
        trust = logits[:, :-1].softmax(-1).gather(-1, known).squeeze(-1) * (following != IGNORED)
    return Reference(seen.vision, seen.final, trust)


def _next_tokens(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The token after each, [rows, tokens - 1]; `IGNORED` for the places of an image.

    Original checkpoints have no word for an image: its id is beyond their logits.
    """
    following = batch["input_ids"][:, 1:]
    return following.masked_fill(following == model.config.image_token_id, IGNORED)


def loss_terms(
    model: PreTrainedModel,
    batch: Batch,
    reference: Reference,
    layers: Layers,
    jacobians: Mapping[str, float],
    joint: Joint,
    tuning: Tuning,
) -> Terms:
    """Eq. (10) of one batch.

    Args:
        model: with simulated quantization.
        layers: those whose dependencies L_ent sums.
        jacobians: J_k of each layer.
        joint: how the activations of two layers are paired for their dependency.
    """
    with _observed(model, layers if tuning.entropy else {}) as seen:
        logits = _logits(model, batch)
    zero = logits.new_zeros(())
    regression, entropy, error = zero, zero, zero
    if tuning.regression:
        following = _next_tokens(model, batch).flatten()
        losses = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), following, reduction="none", ignore_index=IGNORED
        )
        trust = reference.trust.flatten()
        regression = (losses * trust).sum() / trust.sum().clamp_min(1e-6)
    if tuning.entropy:
        # In the order in which the layers ran; all of them see the same tokens.
        names = [name for name in seen.inputs if jacobians[name]]
        widest = max((seen.inputs[name].shape[-1] for name in names), default=1)
        read = [
            Activation(_some_tokens(seen.inputs[name], widest, layers[name][1]), layers[name][1])
            for name in names
        ]
        for name, (first, second) in zip(names, pairwise(read), strict=False):
            entropy = entropy + jacobians[name] * conditional_entropy(joint(first, second))
    if tuning.error:
        error = _distance(seen.vision, reference.vision)
        error = error + tuning.eta * _distance(seen.final, reference.final)
    total = tuning.regression * regression + tuning.entropy * entropy + tuning.error * error
    return Terms(regression, entropy, error, total)


def jacobian_norms(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    references: Sequence[Reference],
    layers: Layers,
) -> dict[str, float]:
    """J_k of eq. (8): ||d ||Xn_q - Xn_r|| / d X_k|| over all batches, scaled to sum to one.

    A layer that the output does not depend on has zero; so has every layer if the error is zero.
    """
    squares = dict.fromkeys(layers, 0.0)
    if not layers:
        return squares
    for batch, kept in zip(batches, references, strict=True):
        with _observed(model, layers, track=True) as seen:
            _logits(model, batch)
        names = list(seen.inputs)
        gradients = torch.autograd.grad(
            _distance(seen.final, kept.final) * len(batch["input_ids"]),
            [seen.inputs[name] for name in names],
            allow_unused=True,
        )
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                squares[name] += float(gradient.double().square().sum())
    norms = {name: square**0.5 for name, square in squares.items()}
    total = sum(norms.values())
    return {name: norm / total if total else 0.0 for name, norm in norms.items()}


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
        batches: with images; each is run at once, and as many as it takes to reach
            `tuning.batch_size` pairs make one step.

    Returns:
        For the record: the Jacobian norms, and the mean of each term in every epoch.

    Raises:
        RunError: if the loss is not finite.
    """
    with _only_tower_trains(model) as parameters:
        jacobians = dict.fromkeys(layers, 0.0)
        if tuning.entropy:
            jacobians = jacobian_norms(model, batches, references, layers)
        steps = _schedule([len(batch["input_ids"]) for batch in batches], tuning)
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
                    raise RunError("the loss of the visual encoder optimisation is not finite")
                (terms.total * share).backward()
                for name in history[-1]:
                    history[-1][name] += getattr(terms, name).item() * len(batch["input_ids"])
            for group in optimizer.param_groups:
                group["lr"] = tuning.learning_rate * 0.5 * (1 + cos(pi * position / len(steps)))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    count = sum(len(batch["input_ids"]) for batch in batches)
    return {
        "pairs": count,
        "steps": len(steps),
        "jacobian_norms": jacobians,
        "losses": [{name: value / count for name, value in sums.items()} for sums in history],
    }


def simulate(walk: Walk) -> dict[str, nn.Linear]:
    """Quantizes the walk's model with the ranges that every method starts from, for a while.

    Returns:
        The float linears by full name, for `unwind`. Those of the tower stay trainable.
    """
    floats: dict[str, nn.Linear] = {}
    for block in walk.blocks():
        for name, samples in block.linear_inputs().items():
            floats[block.layer_name(name)] = block.linears[name]
            keep = block.kind == "vision"
            block.replace(name, block.quantize_linear(name, samples, keep_float=keep))
    return floats


@torch.no_grad()
def unwind(model: PreTrainedModel, floats: Mapping[str, nn.Linear]) -> None:
    """Puts the float linears back, those of the tower with the weights that were tuned."""
    for full_name, linear in floats.items():
        parent, _, child = full_name.rpartition(".")
        layer = model.get_submodule(full_name)
        assert isinstance(layer, QuantLinear)
        if layer.float_weight is not None:
            weight, inputs = layer.float_weight, layer.input_quantizer
            linear.weight.copy_(
                weight / inputs.scale
                if isinstance(inputs, UniformQuantizer) and inputs.folds
                else weight
            )
            if linear.bias is not None and layer.bias is not None:
                linear.bias.copy_(layer.bias)
        setattr(model.get_submodule(parent), child, linear)


def freeze(model: PreTrainedModel) -> None:
    """Quantizes for good what is still trainable."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.freeze()


def tower_layers(model: PreTrainedModel) -> Layers:
    """The quantized linears of the vision tower; empty if it is in floating point."""
    return {
        f"{name}.{inner}": (layer, layer.input_quantizer)
        for name, module in vision_layers(model).items()
        for inner, layer in module.named_modules()
        if isinstance(layer, QuantLinear)
    }


class _Seen:
    """What the hooks of one forward pass caught."""

    vision: Tensor
    final: Tensor

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}


@contextmanager
def _observed(model: PreTrainedModel, layers: Layers, track: bool = False) -> Iterator[_Seen]:
    """Catches the inputs of projector, output head and layers; `track` asks for their gradients."""
    seen = _Seen()

    def vision(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.vision = args[0]

    def final(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.final = args[0]

    def layer(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            x = args[0]
            if track and not x.requires_grad:
                x = x.detach().requires_grad_()
            seen.inputs[name] = x
            return (x, *args[1:])

        return hook

    hooks = [
        next(iter(projector(model).values())).register_forward_pre_hook(vision),
        model.get_output_embeddings().register_forward_pre_hook(final),
    ]
    hooks += [module.register_forward_pre_hook(layer(name)) for name, (module, _) in layers.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _only_tower_trains(model: PreTrainedModel) -> Iterator[list[nn.Parameter]]:
    """Lets gradients reach the tower's layers only, and gives their parameters."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    tower = [
        parameter
        for layer in vision_layers(model).values()
        for parameter in layer.parameters()
        if parameter.dtype == torch.float32
    ]
    if not tower:
        raise UserError(
            "method.veo=True: the vision tower is not in float32; accepted are "
            "model.dtype=float32, or method.veo=false"
        )
    try:
        for parameter in tower:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield tower
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


def _schedule(sizes: Sequence[int], tuning: Tuning) -> list[tuple[int, list[int]]]:
    """The steps, each with its epoch: batches in random order until they hold enough pairs."""
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


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model(**inputs, use_cache=False).logits


def _some_tokens(x: Tensor, width: int, quantizer: Quantizer) -> Tensor:
    """Evenly spaced tokens of [..., features], as many as a piece holds at the width given."""
    tokens = x.flatten(0, -2)
    count = max(1, _PIECE // (width * 2**quantizer.bits))
    if len(tokens) <= count:
        return tokens
    rows = torch.linspace(0, len(tokens) - 1, count, dtype=torch.float64, device=x.device)
    return tokens[rows.long()]


def _distance(value: Tensor, target: Tensor) -> Tensor:
    """Mean over rows of ||value - target|| / ||target||."""
    difference = (value - target).flatten(1).norm(dim=1)
    return (difference / target.flatten(1).norm(dim=1).clamp_min(1e-12)).mean()

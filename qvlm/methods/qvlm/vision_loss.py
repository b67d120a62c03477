"""The loss that visual encoder optimization minimizes.

Q-VLM (arXiv 2410.08119), eq. (8)-(10):

    L = L_reg + lambda_1 L_ent + lambda_2 L_err

- L_reg is the autoregressive loss, the cross-entropy of each next token.
- L_ent = sum_k J_k D(k, k + 1) over the layers of the vision tower (eq. 8 and 9). It lowers the
  dependency of consecutive layers, most where that matters most. J_k is the norm of the Jacobian of
  the final error, d ||Xn_q - Xn_r|| / d X_k, over the calibration set. It needs a backward pass per
  batch and changes slowly. It is therefore computed once, with the rounding that fine-tuning starts
  from, scaled to sum to one (so that L_ent is a mean entropy in nats), and used in every step. The
  released code has a term of this kind for the language model's layers, with fixed coefficients.
- L_err = ||Xv_q - Xv_r|| + eta ||Xn_q - Xn_r|| compares the vision features that the projector
  reads, and what the output head reads, with those of the float model. Each norm is relative to
  that of the float features of the same row, so that weights carry over between models.

Calibration batches do not state where the question ends and the answer begins. Unless a batch has
`labels` (-100 for no loss), a text token counts in L_reg by the probability that the float model
gives it. For a model that was tuned on answers, that is nearly zero in the question.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from qvlm import validation
from qvlm.errors import UserError
from qvlm.methods.qvlm.dependency import (
    Activation,
    Joint,
    conditional_entropy,
    whole_sequences,
)
from qvlm.quantization import Quantizer
from qvlm.quantization.hooks import hooked
from qvlm.quantization.precision import wide
from qvlm.quantization.sampling import evenly_spaced
from qvlm.quantization.targets import parts_of, projector

Batch = Mapping[str, Tensor]
Layers = Mapping[str, tuple[nn.Module, Quantizer]]
"""By name, a layer and the quantizer of its input."""

IGNORED = -100
# Number of elements of the assignments [tokens, features, M] of one layer in one batch. A joint
# distribution of M^2 numbers needs no more, and with more L_ent would cost more than the model.
_PIECE = 2**18


@dataclass(frozen=True)
class Tuning:
    """Options of the fine-tuning. A term whose weight is 0 is not computed.

    Args:
        epochs: Number of passes over the image-text pairs.
        batch_size: Number of pairs per step.
        learning_rate: Initial learning rate of Adam, which decays to zero along a cosine.
        regression: Weight of L_reg.
        entropy: Weight of L_ent, lambda_1.
        error: Weight of L_err, lambda_2.
        eta: Weight of the model's output in L_err.
        checkpointing: Whether layers are computed again in the backward pass instead of keeping
            their activations. None stands for models of 16 bits.
        seed: Seed of the order of the batches.

    Raises:
        UserError: If an option has a value that is not accepted; the message names both.
    """

    epochs: int = 10
    batch_size: int = 8
    learning_rate: float = 1e-4
    regression: float = 1.0
    entropy: float = 0.1
    error: float = 1.0
    eta: float = 1.0
    checkpointing: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            validation.whole_number(f"method.veo_{name}", getattr(self, name))
        for name in ("learning_rate", "regression", "entropy", "error", "eta"):
            validation.number(f"method.veo_{name}", getattr(self, name))
        if self.checkpointing is not None:
            validation.switch("method.veo_checkpointing", self.checkpointing)
        validation.whole_number("method.seed", self.seed, least=0)


@dataclass(frozen=True)
class Reference:
    """The float model's results for a batch.

    Attributes:
        vision: Features that the projector reads, [images, patches, width].
        final: Hidden states that the output head reads, [rows, tokens, width].
        trust: Weight of each next token in L_reg, [rows, tokens - 1].
    """

    vision: Tensor
    final: Tensor
    trust: Tensor


@dataclass(frozen=True)
class Terms:
    """The loss of a batch: its three terms without their weights, and their weighted sum."""

    regression: Tensor
    entropy: Tensor
    error: Tensor
    total: Tensor


@torch.no_grad()
def reference(model: PreTrainedModel, batch: Batch) -> Reference:
    """Runs the float model on a batch with images."""
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
    """The token after each token, [rows, tokens - 1]; `IGNORED` where it belongs to an image.

    Original checkpoints have no token for an image, so its id is beyond their logits.
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
    """Computes eq. (10) for one batch.

    Args:
        model: Model with simulated quantization.
        batch: Keyword arguments of the model's forward, with images.
        reference: Results of the float model for the batch.
        layers: Layers whose dependencies L_ent sums.
        jacobians: J_k of each layer.
        joint: Joint distribution of two activations, which defines their dependency.
        tuning: Weights of the terms.
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
        # In the order in which the layers ran. All of them read the same tokens.
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
    factor: float = 1.0,
) -> dict[str, float]:
    """Computes J_k of eq. (8): ||d ||Xn_q - Xn_r|| / d X_k|| over all batches.

    The norms are scaled to sum to one. J_k is zero for a layer that the output does not depend on,
    and for all layers if the error is zero.

    Args:
        model: Model with simulated quantization.
        batches: Batches with images.
        references: Results of the float model for each batch.
        layers: Layers whose inputs X_k are.
        factor: Number that the error is multiplied by, so that gradients in float16 do not vanish.
    """
    squares = dict.fromkeys(layers, 0.0)
    if not layers:
        return squares
    for batch, kept in zip(batches, references, strict=True):
        with _observed(model, layers, track=True) as seen:
            _logits(model, batch)
            names = list(seen.inputs)
            # Inside, because layers may run again, and have to see the same inputs.
            gradients = torch.autograd.grad(
                _distance(seen.final, kept.final) * len(batch["input_ids"]) * factor,
                [seen.inputs[name] for name in names],
                allow_unused=True,
            )
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                squares[name] += float(gradient.double().square().sum())
    norms = {name: square**0.5 for name, square in squares.items()}
    total = sum(norms.values())
    return {name: norm / total if total else 0.0 for name, norm in norms.items()}


class _Seen:
    """The activations that one forward pass computed."""

    vision: Tensor
    final: Tensor

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}


@contextmanager
def _observed(model: PreTrainedModel, layers: Layers, track: bool = False) -> Iterator[_Seen]:
    """Collects the inputs of projector, output head and layers; `track` enables their gradients."""
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

    hooks: dict[nn.Module, Any] = {
        _one_projector(model): vision,
        model.get_output_embeddings(): final,
    }
    with hooked(hooks | {module: layer(name) for name, (module, _) in layers.items()}):
        yield seen


def _one_projector(model: PreTrainedModel) -> nn.Module:
    """The module that reads all features of the tower.

    Raises:
        UserError: If there is no such module, or there are several.
    """
    parts = list(projector(model).values())
    if len(parts) != 1:
        raise UserError(
            f"method.veo=true is not possible with {parts_of(model).title}, whose tower is read by "
            f"{len(parts)} projectors with linears, and the loss needs one. Give method.veo=false."
        )
    return parts[0]


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return wide(model(**inputs, use_cache=False).logits)


def _some_tokens(x: Tensor, width: int, quantizer: Quantizer) -> Tensor:
    """Evenly spaced tokens of [..., features], as many as `_PIECE` allows at the given width.

    Where scales are those of positions, they are the tokens of evenly spaced sequences.
    """
    count, length = _PIECE // (width * 2**quantizer.bits), whole_sequences(1, quantizer)
    sequences = x.reshape(-1, length, x.shape[-1])
    kept = evenly_spaced(len(sequences), max(1, count // length), x.device)
    return sequences[kept].flatten(0, 1)


def _distance(value: Tensor, target: Tensor) -> Tensor:
    """The mean over rows of ||value - target|| / ||target||."""
    value, target = wide(value), wide(target)  # a norm may be too large for float16
    difference = (value - target).flatten(1).norm(dim=1)
    return (difference / target.flatten(1).norm(dim=1).clamp_min(1e-12)).mean()

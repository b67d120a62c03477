"""A rotated residual stream (QuaRot, arXiv 2404.00456, sections 3 and 4.1; SliceGPT, 2401.15024).

The hidden states x of a language model are replaced by x R with an orthogonal R. Whatever writes to
the stream (embeddings, projector, attention outputs, down projections) absorbs R, and whatever
reads it absorbs its inverse. A channel with large values is then spread over all channels, which
is what rounding needs. A norm stands between the stream and its readers. Its gain and shift are
folded into the readers first; what remains of an RMS norm commutes with every rotation.

A LayerNorm also subtracts the mean over the channels. QuaRot turns it into an RMS norm and
subtracts the mean in whatever writes to the stream. Here R keeps the direction of the mean instead,
so that LayerNorm(x R) = LayerNorm(x) R and the model keeps its architecture:

    RMS norm:   x R = H (x * signs)             LayerNorm:   x R = H^T (signs * (H x)), first sign 1

H is the orthonormal Hadamard matrix, and the signs are random.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qvlm.errors import UserError
from qvlm.quantization.hadamard import hadamard_transform
from qvlm.quantization.targets import parts_of, projector


class StreamRotation:
    """The rotation R of a residual stream.

    Args:
        width: Number of channels.
        keeps_mean: Whether R keeps the direction of the mean, as a LayerNorm needs.
        seed: Seed of the random signs.
    """

    def __init__(self, width: int, keeps_mean: bool, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.signs = torch.randint(0, 2, (width,), generator=random).double() * 2 - 1
        self.keeps_mean = keeps_mean
        if keeps_mean:
            self.signs[0] = 1

    def __call__(self, x: Tensor) -> Tensor:
        """Returns x R in float64, for vectors x [..., width] of any floating-point type."""
        x, signs = x.double(), self.signs.to(x.device)
        if self.keeps_mean:
            return hadamard_transform(signs * hadamard_transform(x), inverse=True)
        return hadamard_transform(x * signs)

    def undo(self, x: Tensor) -> Tensor:
        """Returns x R^T in float64, for vectors x [..., width] of any floating-point type."""
        if self.keeps_mean:
            return self(x)
        return hadamard_transform(x.double(), inverse=True) * self.signs.to(x.device)


@torch.no_grad()
def rotate_reader(linear: nn.Module, norm: nn.Module, rotation: StreamRotation) -> None:
    """Makes a linear map of the norm's output read a rotated stream through a plain norm.

    A norm with a shift leaves a bias, which is added to a linear that has none.

    Args:
        linear: Module with a weight [out, width], which is changed in place.
        norm: Norm in front of it, with its own gain and shift.
        rotation: Rotation of the stream.

    Raises:
        UserError: If the module needs a bias and cannot have one.
    """
    weight = linear.weight
    assert isinstance(weight, Tensor)
    gain, shift = _gain_and_shift(norm)
    if shift is not None:
        if not isinstance(linear, nn.Linear):
            raise UserError(
                f"{type(linear).__name__} reads a norm with a shift and has no bias to take it. "
                "Choose a method without rotation"
            )
        bias = weight.double() @ shift
        bias += 0 if linear.bias is None else linear.bias.double()
        linear.bias = nn.Parameter(bias.to(weight), requires_grad=False)
    weight.copy_(rotation(weight.double() * gain))


@torch.no_grad()
def rotate_writer(linear: nn.Module, rotation: StreamRotation) -> None:
    """Makes a linear with a weight [width, in] write to a rotated stream, in place."""
    weight, bias = linear.weight, getattr(linear, "bias", None)
    assert isinstance(weight, Tensor)
    weight.copy_(rotation(weight.T).T)
    if isinstance(bias, Tensor):
        bias.copy_(rotation(bias))


@torch.no_grad()
def make_plain(norm: nn.Module) -> None:
    """Sets a norm's gain to one and its shift to zero, once all of its readers absorbed them."""
    gain, shift = norm.weight, getattr(norm, "bias", None)
    assert isinstance(gain, Tensor)
    gain.fill_(1)
    if isinstance(shift, Tensor):
        shift.zero_()


@torch.no_grad()
def rotate_ends(model: PreTrainedModel, seed: int = 0) -> StreamRotation:
    """Rotates what writes to the stream before the first decoder layer, and what reads its end.

    Embeddings, the last linear of each part of the projector and the output head absorb the
    rotation, the head also the last norm. So do learned vectors that stand between image features,
    which the model's table names. A head that shares its weight with the embeddings gets a weight
    of its own. The decoder layers are `layer.rotate_layer`'s.

    Args:
        model: Model in floating point, which is changed in place.
        seed: Seed of the rotation.

    Returns:
        The rotation that the decoder layers must absorb.

    Raises:
        UserError: If the model has no norm behind its decoder layers, or its table says that no
            rotation is possible.
    """
    parts = parts_of(model)
    if parts.unrotatable:
        raise UserError(
            f"{parts.title}'s residual stream cannot be rotated: {parts.unrotatable}. "
            "method.stream=false rotates everything else."
        )
    norm = _last_norm(model.get_submodule(parts.decoder.rpartition(".")[0]))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rotation = StreamRotation(embedding.weight.shape[1], isinstance(norm, nn.LayerNorm), seed)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    rotate_reader(head, norm, rotation)
    make_plain(norm)
    # A checkpoint of the rotated model has to say which modules have a bias now.
    model.config.head_bias = head.bias is not None
    model.config.get_text_config().router_bias = getattr(norm, "bias", None) is not None
    embedding.weight.copy_(rotation(embedding.weight))
    for module in projector(model).values():
        rotate_writer([m for m in module.modules() if isinstance(m, nn.Linear)][-1], rotation)
    for vector in map(model.get_parameter, parts.stream):
        vector.copy_(rotation(vector))
    return rotation


def _gain_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Gain [width] and shift [width] of a norm in float64; None if it has no shift."""
    gain, shift = norm.weight, getattr(norm, "bias", None)
    assert isinstance(gain, Tensor)
    return gain.double(), shift.double() if isinstance(shift, Tensor) else None


def _last_norm(language_model: nn.Module) -> nn.Module:
    """The norm behind the last decoder layer: the only direct child with a weight vector."""
    norms = [
        child
        for child in language_model.children()
        if isinstance(weight := getattr(child, "weight", None), Tensor) and weight.ndim == 1
    ]
    if len(norms) != 1:
        raise UserError(
            f"{type(language_model).__name__} has {len(norms)} norms behind its decoder layers, "
            "and a rotation needs one. Choose a method without rotation"
        )
    return norms[0]

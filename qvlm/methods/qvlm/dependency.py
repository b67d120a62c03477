"""Cross-layer dependency: how uncertain a layer's rounding is, given that of the layer before.

Q-VLM (arXiv 2410.08119), eq. (3)-(5). Every activation is softly assigned to the M = 2^b rounding
points q_m of its scale,

    p(x = q_m) = softmax_m(-(x - q_m)^2 / Delta),      Delta the distance of two rounding points,

and the dependency of two consecutive layers is the conditional entropy

    D(k, k+1) = -sum_mn p(x_k = q_m, x_k+1 = q_n) log p(x_k+1 = q_n | x_k = q_m)      (in nats).

It is large if the first layer's rounding tells little about the second's; there the paper searches
jointly. The activation of a layer is what its linear reads, the tensor that is quantized.

The joint distribution needs pairs of elements, which the paper does not define for layers of
different width. There are two pairings:

- `elements` pairs element i, j of one layer with element i, j of the next. The joint distribution
  is the mean, over tokens and channels, of the outer product of the two assignments. If the layers
  differ in width, each channel of the wider one is paired with the channel at the same relative
  position in the narrower one. (The released code pairs layers of equal shape only.)
- `tokens` averages the assignments of a token's channels to a histogram over rounding points. The
  joint distribution is the mean, over tokens, of the outer product of the two layers' histograms.
  The average loses which channels are related: two linears that read one and the same activation
  look nearly as independent as any others.

Both are means where the paper writes sums over elements, so that a wide layer does not count for
more. Layers that do not read the same tokens (two experts, vision and language) have no dependency.

For comparison (Table 5) there is a second proxy, the relative quantization error of the two
activations.

Mining needs one pass over the calibration data, with the samples of one block in memory, so that a
streamed model can be mined (see `Walk.survey`). Not here:
dependencies across the end of a decoder layer, unless whole decoder layers are the units.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn

from qvlm.errors import UserError
from qvlm.quantization import Block, Quantizer, UniformQuantizer, Walk, activation_quantizer
from qvlm.quantization.position_quantizer import PositionQuantizer
from qvlm.quantization.precision import settled

# Number of elements of an assignment [tokens, features, M] that are in memory at a time.
_PIECE = 2**22


def assignment(x: Tensor, quantizer: Quantizer, scale_free: bool = False) -> Tensor:
    """Assigns activations softly to their rounding points (eq. 5).

    With q_m = s n, n = m - z, and Delta = s, -(x - q_m)^2 / Delta = 2 x n - s n^2 - x^2 / s. The
    last term is the same for all m and is omitted: it would overflow for a channel that was silent
    in calibration, whose scale is tiny.

    Args:
        x: Activations [..., features], of whole sequences if the quantizer has scales of positions.
            Gradients flow through them; the grid is a constant.
        quantizer: Uniform quantizer of the activations. A per-token one makes its grid from `x`.
        scale_free: Whether the squared distance is divided by Delta^2 instead of Delta. Then the
            softness of the assignment does not depend on the unit of `x`.

    Returns:
        Probabilities [..., features, M].

    Raises:
        UserError: If the quantizer is not uniform.
    """
    grid = quantizer.for_tokens(x)
    if not isinstance(grid, UniformQuantizer) or grid.group_size is not None:
        raise UserError("the dependency of layers is defined for uniform activation quantizers")
    if isinstance(grid, PositionQuantizer):
        shape = x.shape
        x = x.view(-1, len(grid.scale), shape[-1])
        plain = UniformQuantizer(grid.bits, grid.scale, grid.zero_point)
        return assignment(x, plain, scale_free).view(*shape, -1)
    levels = torch.arange(2**grid.bits, dtype=x.dtype, device=x.device)
    n = levels - grid.zero_point.unsqueeze(-1)
    if scale_free:
        # Clamped far beyond any grid, where all of the probability is on the grid's last point.
        steps = (x / grid.scale).clamp(-(2.0**20), 2.0**20)
        return (2 * steps.unsqueeze(-1) * n - n.square()).softmax(-1)
    return (2 * x.unsqueeze(-1) * n - grid.scale.unsqueeze(-1) * n.square()).softmax(-1)


def whole_sequences(count: int, quantizer: Quantizer) -> int:
    """Returns about as many tokens as `count`, at least one, that are whole sequences.

    Args:
        count: Number of tokens.
        quantizer: Quantizer of the tokens; if it has scales of positions, they come in sequences.
    """
    length = len(quantizer.scale) if isinstance(quantizer, PositionQuantizer) else 1
    return max(1, count // length) * length


def token_histograms(x: Tensor, quantizer: Quantizer, scale_free: bool = False) -> Tensor:
    """Averages the assignments of each token's channels: x [tokens, features] to [tokens, M]."""
    rows = whole_sequences(_PIECE // (x.shape[-1] * 2**quantizer.bits), quantizer)
    return torch.cat([assignment(part, quantizer, scale_free).mean(-2) for part in x.split(rows)])


def conditional_entropy(joint: Tensor) -> Tensor:
    """Computes H(second | first) in nats of a joint distribution [first, second] (eq. 4).

    0 log 0 counts as 0 and so does its gradient, since most pairs of many rounding points never
    occur.
    """
    joint = joint.clamp_min(torch.finfo(joint.dtype).tiny)
    first = joint.sum(1, keepdim=True)
    return -(joint * (joint.log() - first.log())).sum()


@dataclass(frozen=True)
class Activation:
    """What a layer reads during calibration, and the quantizer that will round it.

    Attributes:
        samples: Activations [tokens, features].
        quantizer: Quantizer of the activations.
        scale_free: See `assignment`.
    """

    samples: Tensor
    quantizer: Quantizer
    scale_free: bool = False

    @cached_property
    def histograms(self) -> Tensor:
        """Histogram over rounding points of each token, [tokens, M]."""
        return token_histograms(self.samples, self.quantizer, self.scale_free)

    @cached_property
    def error(self) -> float:
        """Squared rounding error, as a share of the activation's energy."""
        difference = (self.quantizer(self.samples) - self.samples).square().sum()
        return settled(float(difference / self.samples.square().sum().clamp_min(1e-30)))


Joint = Callable[[Activation, Activation], Tensor]
"""Computes the joint distribution [M, M'] of two activations of the same tokens."""

Dependency = Callable[[Activation, Activation], float]
"""Computes D(k, k+1) of two activations of the same tokens, rounded to float32."""


def element_joint(first: Activation, second: Activation) -> Tensor:
    """Computes the joint distribution with the pairing `elements`."""
    widths = first.samples.shape[1], second.samples.shape[1]
    levels = 2**first.quantizer.bits, 2**second.quantizer.bits
    position = torch.arange(max(widths), device=first.samples.device)
    channels = [position * width // max(widths) for width in widths]
    rows = whole_sequences(_PIECE // (max(widths) * max(levels)), first.quantizer)
    joint = first.samples.new_zeros(levels)
    for one, other in zip(first.samples.split(rows), second.samples.split(rows), strict=True):
        p = assignment(one, first.quantizer, first.scale_free)[:, channels[0]]
        q = assignment(other, second.quantizer, second.scale_free)[:, channels[1]]
        joint = joint + p.flatten(0, 1).T @ q.flatten(0, 1)
    return joint / joint.sum()


def token_joint(first: Activation, second: Activation) -> Tensor:
    """Computes the joint distribution with the pairing `tokens`."""
    return first.histograms.T @ second.histograms / len(first.histograms)


JOINTS: Mapping[str, Joint] = {"elements": element_joint, "tokens": token_joint}


def entropy(joint: Joint) -> Dependency:
    """The dependency that is the conditional entropy of a joint distribution."""
    return lambda first, second: settled(float(conditional_entropy(joint(first, second))))


def quantization_error(first: Activation, second: Activation) -> float:
    """The proxy that Table 5 compares with: the mean relative quantization error of both."""
    return (first.error + second.error) / 2


@dataclass(frozen=True)
class Chain:
    """Layers in the order of the data, with the dependency of each on the one before.

    Attributes:
        name: Name of the walk's block whose linears these are, or the kind of the whole layers.
        part: "vision" or "language" (with the projector), which share an activation spec.
        units: Names of the linears relative to their block, or full names of the whole layers.
        dependencies: Dependency of each unit but the first on the one before; None where there is
            none.
    """

    name: str
    part: str
    units: list[str]
    dependencies: list[float | None]


@torch.no_grad()
def mine(
    walk: Walk, dependency: Dependency, granularity: str, max_tokens: int, scale_free: bool = False
) -> list[Chain]:
    """Surveys the float model once and measures the dependencies of consecutive layers.

    Args:
        walk: Walk over a float model.
        dependency: Measure of the dependency.
        granularity: "linear" for a chain per block of the walk, made of its linears, or "layer" for
            a chain per kind of block, made of whole layers. A whole layer's activation is that of
            its first linear.
        max_tokens: Approximate number of tokens that the distributions are estimated from.
        scale_free: See `assignment`.
    """
    chains: list[Chain] = []
    previous: Activation | None = None
    kind = ""
    for block in walk.survey():
        read = _activations(block, max_tokens, scale_free)
        part = "vision" if block.kind == "vision" else "language"
        if granularity == "linear":
            names = list(read)
            pairs = [
                _measure(dependency, read[a], read[b]) if lane(block, a) == lane(block, b) else None
                for a, b in pairwise(names)
            ]
            chains.append(Chain(block.name, part, names, pairs))
            continue
        first = next(iter(read.values()))
        if block.kind == kind:
            chains[-1].units.append(block.name)
            chains[-1].dependencies.append(_measure(dependency, previous, first))
        else:
            chains.append(Chain(block.kind, part, [block.name], []))
        kind, previous = block.kind, first
    return chains


def lane(block: Block, name: str) -> str:
    """The name of the parallel module (expert) that contains a linear; "" if there is none.

    Linears of one lane read the same tokens.
    """
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if isinstance(block.module.get_submodule(".".join(parts[: end - 1])), nn.ModuleList):
            return ".".join(parts[:end])
    return ""


def _activations(block: Block, max_tokens: int, scale_free: bool) -> dict[str, Activation | None]:
    """The activation of each linear of a float block; None for a linear that reads no token."""
    read: dict[str, Activation | None] = {}
    last: Activation | None = None
    for name, samples in block.linear_inputs(max_tokens).items():
        if len(samples) == 0:
            read[name] = None
        elif last is not None and torch.equal(last.samples, samples):
            read[name] = last  # queries, keys and values read the same tensor: measured once
        else:
            quantizer = activation_quantizer(samples, block.spec(name)[1])
            read[name] = last = Activation(samples, quantizer, scale_free)
    return read


def _measure(
    dependency: Dependency, first: Activation | None, second: Activation | None
) -> float | None:
    return None if first is None or second is None else dependency(first, second)

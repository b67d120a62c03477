"""One decoder layer with a rotated residual stream, and rotated heads (QuaRot, arXiv 2404.00456).

Queries, keys, values, gate, up, experts' gates and ups, and routers read the stream; the attention
output and down projections write to it. Within attention, the values of each head are rotated by a
Hadamard matrix of the head's width, which the value projection and the attention output absorb:
attention mixes positions and leaves the channels of a head alone. Query heads that share a
key-value head share its rotation, since all heads have the same matrix.

A layer that computes something else afterwards is refused: it is run before and after on the first
calibration batch, and what it adds to the stream is compared. So a norm of another kind (one plus
its weight, or behind attention) is not rotated wrongly.
"""

import torch
from torch import Tensor, nn

from qvlm.errors import UserError
from qvlm.methods.rotation.stream import (
    StreamRotation,
    make_plain,
    rotate_reader,
    rotate_writer,
)
from qvlm.quantization.calls import Call, run_calls
from qvlm.quantization.hadamard import hadamard_transform

# Linears that write to the residual stream, by the names that transformers uses.
WRITERS = frozenset({"o_proj", "dense", "out_proj", "down_proj", "fc2"})
# A token may be routed elsewhere because a router's logits round differently.
_ALIKE, _MOST = 0.05, 0.9


@torch.no_grad()
def rotate_layer(
    layer: nn.Module, rotation: StreamRotation | None, heads: bool, calls: list[Call], name: str
) -> None:
    """Rotates what a decoder layer reads, writes and, with `heads`, mixes within attention.

    Args:
        layer: Decoder layer in floating point, which is changed in place.
        rotation: Rotation of the residual stream; None leaves it as it is.
        heads: Whether the values of each head are rotated as well.
        calls: Calls of the layer with rotated hidden states; the first is run to check the result.
        name: Full name of the layer, for messages.

    Raises:
        UserError: If the layer's structure is not known or its function changes.
    """
    expected = _rotated_outputs(layer, rotation, calls[:1])
    if rotation is not None:
        _rotate_stream(layer, rotation, name)
    if heads:
        _rotate_heads(layer, name)
    for call, before in zip(calls[:1], expected, strict=True):
        if not _agree(run_calls(layer, [call])[0], before, _hidden_states(call)):
            raise _unknown(name, layer, "it computes something else afterwards")


def _rotated_outputs(
    layer: nn.Module, rotation: StreamRotation | None, calls: list[Call]
) -> list[Tensor]:
    """What a layer that is not rotated yet has to give once it is."""
    if rotation is None:
        return run_calls(layer, calls)
    return [rotation(run_calls(layer, [_undone(call, rotation)])[0]) for call in calls]


def _agree(output: Tensor, expected: Tensor, hidden: Tensor) -> bool:
    """Whether a layer adds the same to nearly every token; all are [batch, tokens, width]."""
    added = (expected.double() - hidden.double()).norm(dim=-1)
    error = (output.double() - expected.double()).norm(dim=-1)
    rounding = torch.finfo(hidden.dtype).eps * expected.double().norm(dim=-1)
    return float((error <= _ALIKE * added + 8 * rounding).double().mean()) >= _MOST


def _rotate_stream(layer: nn.Module, rotation: StreamRotation, name: str) -> None:
    maps = {
        part: module
        for part, module in layer.named_modules()
        if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.ndim == 2
    }
    norms: list[nn.Module] = []
    for part, module in maps.items():
        if part.rpartition(".")[2] in WRITERS:
            rotate_writer(module, rotation)
        else:
            norm = _norm_before(layer, part, name)
            rotate_reader(module, norm, rotation)
            norms.append(norm)
    for norm in {id(norm): norm for norm in norms}.values():
        make_plain(norm)


def _norm_before(layer: nn.Module, part: str, name: str) -> nn.Module:
    """The norm whose output a linear reads. Phi's attention and MLP share one."""
    names = ["input_layernorm"]
    if "attn" not in part.partition(".")[0]:
        names.insert(0, "post_attention_layernorm")
    for norm in names:
        if (module := getattr(layer, norm, None)) is not None:
            return module
    raise _unknown(name, layer, f"no norm in front of {part} is known")


def _rotate_heads(layer: nn.Module, name: str) -> None:
    linears = {
        part.rpartition(".")[2]: module
        for part, module in layer.named_modules()
        if isinstance(module, nn.Linear) and "attn" in part.partition(".")[0]
    }
    value = linears.get("v_proj")
    output = next((linears[part] for part in linears if part in WRITERS), None)
    width = next((m.head_dim for m in layer.modules() if hasattr(m, "head_dim")), None)
    if value is None or output is None or not isinstance(width, int):
        raise _unknown(name, layer, "its attention has no v_proj, output and head_dim")
    for tensor in (value.weight.T, output.weight):  # channels of heads come last in both
        tensor.copy_(_by_head(tensor, width))
    if value.bias is not None:
        value.bias.copy_(_by_head(value.bias, width))


def _by_head(x: Tensor, width: int) -> Tensor:
    """Transforms the channels [..., heads * width] of each head by itself."""
    return hadamard_transform(x.double().unflatten(-1, (-1, width))).flatten(-2)


def _undone(call: Call, rotation: StreamRotation) -> Call:
    """A call with the hidden states that it had without the rotation; the rest is copied."""
    args, kwargs = call
    hidden = _hidden_states(call)
    undone = rotation.undo(hidden).to(hidden)
    return ((undone, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": undone})


def _hidden_states(call: Call) -> Tensor:
    """The hidden states [batch, tokens, width] of a call."""
    args, kwargs = call
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, Tensor)
    return hidden


def _unknown(name: str, layer: nn.Module, why: str) -> UserError:
    return UserError(
        f"{name} ({type(layer).__name__}) cannot be rotated: {why}. Choose a method without "
        "rotation"
    )

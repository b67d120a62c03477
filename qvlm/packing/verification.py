"""Proof of the bits of a packed model: the codes that its products are made of are counted.

A packed layer holds nothing but codes, so there is less to doubt than in a simulated one. Still the
distinct codes of each weight scale are counted, and those that the layer makes of the inputs that
reach it; a layer that is not packed has zero of both, which every table refuses.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qvlm.packing.layer import PackedLinear
from qvlm.packing.model import packed_layers
from qvlm.quantization.verification import LayerBits

_PROBE_TOKENS = 64
# Weight rows and tokens that are counted, as a bound on the cost.
_MAX_ROWS = 1024


@torch.no_grad()
def measure_packed_bits(
    model: nn.Module, expected: Sequence[str], batches: Iterable[Mapping[str, Tensor]]
) -> list[LayerBits]:
    """Counts the codes of every expected layer, of inputs during forward passes on `batches`.

    Args:
        model: packed.
        expected: full names of the layers that must be.
        batches: keyword arguments of the model's forward.

    Returns:
        A row per expected layer, in that order.
    """
    layers = packed_layers(model)
    inputs = dict.fromkeys(layers, 0)

    def watch(name: str) -> Any:
        def hook(layer: PackedLinear, args: tuple[Tensor, ...]) -> None:
            inputs[name] = max(inputs[name], _input_codes(layer, args[0]))

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        for batch in batches:
            model(**batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    rows = []
    for name in expected:
        layer = layers.get(name)
        if layer is None:
            rows.append(LayerBits(name, 0, 0, 0, 0))
            continue
        probed = not inputs[name]
        if probed:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(_PROBE_TOKENS, layer.in_features, generator=generator)
            inputs[name] = _input_codes(layer, x.to(layer.codes.device))
        form = layer.form
        bits = form.weight_bits, form.input_bits
        rows.append(LayerBits(name, *bits, _weight_codes(layer), inputs[name], probed))
    return rows


def _weight_codes(layer: PackedLinear) -> int:
    """The most distinct codes of one scale."""
    form = layer.form
    codes = layer.weight_codes()[:_MAX_ROWS, layer.channels()].long()
    width = form.group_size if form.weight == "uniform" else codes.shape[1]
    group = torch.arange(codes.shape[1], device=codes.device) // width
    row = torch.arange(len(codes), device=codes.device)[:, None]
    if form.weight == "uniform" and form.scale_shape[0] == 1:
        row = torch.zeros_like(row)
    return _most(row * (int(group.max()) + 1) + group, codes, form.weight_bits)


def _input_codes(layer: PackedLinear, x: Tensor) -> int:
    """The most distinct codes of one scale in an input [..., in]; 0 if it is empty."""
    x = x.reshape(-1, layer.in_features)[:_MAX_ROWS]
    if not len(x):
        return 0
    steps, _, zero_point = layer.input_steps(x)
    codes = (steps + zero_point).long()
    if layer.form.inputs == "token":
        scale = torch.arange(len(x), device=x.device)[:, None]
    else:
        scale = layer.input_steps(x[:1])[1].unique(return_inverse=True)[1]
    return _most(scale.expand(codes.shape), codes, layer.form.input_bits)


def _most(scale: Tensor, codes: Tensor, bits: int) -> int:
    """The most distinct codes that share a scale, given by number."""
    pairs = (scale * 2 ** (bits + 1) + codes).flatten().unique()
    return int((pairs // 2 ** (bits + 1)).unique_consecutive(return_counts=True)[1].max())

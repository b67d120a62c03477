"""Proof of the bits of a packed model: the distinct codes that its products multiply are counted.

A packed layer holds codes only, so less can go wrong than in a simulated one. Still the distinct
codes of each weight scale are counted, and those that the layer makes of the inputs that reach it.
A layer that is not packed gets zero for both, and every table refuses such a row.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from qvlm.packing.layer import PackedLinear
from qvlm.packing.model import packed_layers
from qvlm.quantization.hooks import hooked
from qvlm.quantization.verification import LayerBits

_PROBE_TOKENS = 64
# Weight rows and tokens that are counted at most, which bounds the cost.
_MAX_ROWS = 1024


@torch.no_grad()
def measure_packed_bits(
    model: nn.Module, expected: Sequence[str], batches: Iterable[Mapping[str, Tensor]]
) -> list[LayerBits]:
    """Counts the codes of every expected layer: of its weight, and of inputs in forward passes.

    Args:
        model: Packed model.
        expected: Full names of the layers that must be packed.
        batches: Keyword arguments of the model's forward, one mapping per pass. A layer that no
            input reaches is probed with random inputs.

    Returns:
        One row per expected layer, in the given order.
    """
    layers = packed_layers(model)
    inputs = dict.fromkeys(layers, 0)

    def count(name: str) -> Callable[[PackedLinear, tuple[Tensor, ...]], None]:
        def hook(layer: PackedLinear, args: tuple[Tensor, ...]) -> None:
            inputs[name] = max(inputs[name], _input_codes(layer, args[0]))

        return hook

    with hooked(before={layer: count(name) for name, layer in layers.items()}):
        for batch in batches:
            model(**batch, use_cache=False)
    rows = []
    for name in expected:
        packed = layers.get(name)
        if packed is None:
            rows.append(LayerBits(name, 0, 0, 0, 0))
            continue
        probed = not inputs[name]
        if probed:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(_PROBE_TOKENS, packed.in_features, generator=generator)
            inputs[name] = _input_codes(packed, x.to(packed.codes.device))
        bits = packed.form.weight_bits, packed.form.input_bits
        rows.append(LayerBits(name, *bits, _weight_codes(packed), inputs[name], probed))
    return rows


def refutation(
    model: nn.Module, rows: Iterable[LayerBits], weights: int, activations: int
) -> str | None:
    """Returns why a packed model does not have the bits that it is said to have, or None.

    A layer may have fewer bits, as a method may choose, but some layer must have as many. The codes
    must also take more values than fewer bits could hold: 4-bit values that are stored in 8 bits
    are not an 8-bit model.

    Args:
        model: Packed model.
        rows: What `measure_packed_bits` counted in its expected layers.
        weights, activations: Bits that the model is said to have.
    """
    rows, layers = list(rows), packed_layers(model)
    if not rows:
        return "none of its layers is expected to be packed"
    for row in rows:
        if row.layer not in layers:
            return f"{row.layer} is not packed"
    for part, found, said in (
        ("weights", [row.w_bits for row in rows], weights),
        ("activations", [row.a_bits for row in rows], activations),
    ):
        if max(found) != said:
            return f"its {part} have {max(found)} bits, not {said}"
    widest = [row for row in rows if row.w_bits == weights]
    # Few weights that share a scale do not take all values; a quarter of their number they do.
    if all(
        row.weight_levels <= min(2 ** (weights - 1), _sharing(layers[row.layer]) // 4)
        for row in widest
    ):
        most = max(row.weight_levels for row in widest)
        return f"its weights take at most {most} values per scale, which {weights} bits do not need"
    return None


def _sharing(layer: PackedLinear) -> int:
    """Returns the number of weights that share a scale, among those whose codes are counted."""
    form = layer.form
    if form.weight != "uniform":
        return form.in_features
    rows = min(form.out_features, _MAX_ROWS) if form.scale_shape[0] == 1 else 1
    return rows * min(form.group_size, form.in_features)


def _weight_codes(layer: PackedLinear) -> int:
    """Returns the largest number of distinct weight codes that share a scale."""
    form = layer.form
    codes = layer.weight_codes()[:_MAX_ROWS, layer.channels()].long()
    width = form.group_size if form.weight == "uniform" else codes.shape[1]
    group = torch.arange(codes.shape[1], device=codes.device) // width
    row = torch.arange(len(codes), device=codes.device)[:, None]
    if form.weight == "uniform" and form.scale_shape[0] == 1:
        row = torch.zeros_like(row)
    return _most_codes(row * (int(group.max()) + 1) + group, codes, form.weight_bits)


def _input_codes(layer: PackedLinear, x: Tensor) -> int:
    """Returns the largest number of distinct codes of an input [..., in] that share a scale.

    An empty input has zero codes.
    """
    most = _MAX_ROWS
    if layer.form.inputs == "position":  # whole sequences
        most = max(1, most // layer.form.input_shape[0]) * layer.form.input_shape[0]
    x = x.reshape(-1, layer.in_features)[:most]
    if not len(x):
        return 0
    steps, _, zero_point = layer.input_steps(x)
    codes = (steps + zero_point).long()
    if layer.form.inputs != "static":
        scale = torch.arange(len(x), device=x.device)[:, None]
        if layer.form.inputs == "position":
            scale = scale % layer.form.input_shape[0]
    else:
        scale = layer.input_steps(x[:1])[1].unique(return_inverse=True)[1]
    return _most_codes(scale.expand(codes.shape), codes, layer.form.input_bits)


def _most_codes(scale: Tensor, codes: Tensor, bits: int) -> int:
    """Returns the largest number of distinct codes that share a scale.

    Args:
        scale: Index of the scale of each code, of the shape of `codes`.
        codes: Codes of `bits` bits, int64.
        bits: Bit width of the codes.
    """
    pairs = (scale * 2 ** (bits + 1) + codes).flatten().unique()
    return int((pairs // 2 ** (bits + 1)).unique_consecutive(return_counts=True)[1].max())

"""Packs the layers of a whole quantized model in place, and counts the bytes of its weights."""

from collections import Counter
from typing import Any

from torch import nn

from qvlm.errors import UserError
from qvlm.packing.kernels import AUTO, kernel_named
from qvlm.packing.layer import PackedLinear
from qvlm.quantization.linear import QuantLinear


def pack_model(model: nn.Module, kernel: str = AUTO) -> int:
    """Replaces every `QuantLinear` of a model with a `PackedLinear`, one at a time.

    Args:
        model: Quantized model.
        kernel: Kernel for every layer, see `force_kernel`.

    Returns:
        Number of layers that were packed.

    Raises:
        UserError: If the model has no quantized linear, a layer has no packed form, there is no
            such kernel, or it serves none of the layers.
    """
    layers = [name for name, part in model.named_modules() if isinstance(part, QuantLinear)]
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no quantized linear to pack. Quantize the model first."
        )
    for name in layers:
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        layer.layer_name = layer.layer_name or name
        model.set_submodule(name, PackedLinear.from_quantized(layer))
    force_kernel(model, kernel)
    return len(layers)


def force_kernel(model: nn.Module, kernel: str) -> None:
    """Makes every packed layer use a kernel, except layers that it cannot serve.

    These stay at "auto". `kernels_used` tells which kernels ran.

    Raises:
        UserError: If there is no such kernel, or it serves none of the layers.
    """
    if kernel == AUTO:
        return
    forced, layers = kernel_named(kernel), packed_layers(model).values()
    served = [layer for layer in layers if forced.obstacle(layer) is None]
    if not served:
        choices = ", ".join((AUTO, *sorted({name for layer in layers for name in layer.serving()})))
        raise UserError(
            f"kernel={kernel!r} serves no layer of this model. Choose one of: {choices}."
        )
    for layer in served:
        layer.kernel = kernel


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """Returns the packed layers of a model by their full names."""
    return {name: part for name, part in model.named_modules() if isinstance(part, PackedLinear)}


def kernels_used(model: nn.Module) -> dict[str, int]:
    """Returns the number of calls that each kernel has served in all packed layers, by its name."""
    return dict(sum((layer.used for layer in packed_layers(model).values()), Counter[str]()))


def kernel_choices(model: nn.Module) -> list[dict[str, Any]]:
    """Returns what `kernel=auto` chose in all packed layers and why, each kind of layer once.

    Returns:
        For each kind that was measured, its shape [out, in], the model's type, the number of
        threads, the least and largest number of rows, the kernel, and milliseconds by kernel and
        for "float", the floating-point product of the same size.
    """
    rows: dict[tuple[Any, ...], list[int]] = {}
    for layer in packed_layers(model).values():
        for (count, dtype, threads, _), (kernel, seconds) in layer.choices.items():
            shape = (layer.out_features, layer.in_features)
            times = tuple((name, 1e3 * value) for name, value in seconds.items())
            kind = (shape, str(dtype).removeprefix("torch."), threads, kernel, times)
            if times:
                rows.setdefault(kind, []).append(count)
    return [
        {
            "shape": list(shape),
            "dtype": dtype,
            "threads": threads,
            "rows": [min(counts), max(counts)],
            "kernel": kernel,
            "milliseconds": dict(times),
        }
        for (shape, dtype, threads, kernel, times), counts in rows.items()
    ]


def weight_bytes(model: nn.Module) -> int:
    """Returns the bytes of all parameters and buffers, where shared tensors count once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())

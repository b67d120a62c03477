"""Packs a whole quantized model in place, and counts what its weights take."""

from collections import Counter

from torch import nn

from qvlm.errors import UserError
from qvlm.packing.layer import PackedLinear
from qvlm.quantization.linear import QuantLinear


def pack_model(model: nn.Module, kernel: str = "auto") -> int:
    """Puts a `PackedLinear` in the place of every `QuantLinear`, one at a time.

    Args:
        kernel: of every layer; one that cannot take a layer leaves that at "auto". What ran is in
            `kernels_used`.

    Returns:
        How many layers were packed.

    Raises:
        UserError: if there is nothing to pack, the kernel takes no layer, or a layer has no packed
            form.
    """
    layers = [name for name, part in model.named_modules() if isinstance(part, QuantLinear)]
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no quantized linear to pack: quantize it before"
        )
    for name in layers:
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        layer.layer_name = layer.layer_name or name
        model.set_submodule(name, PackedLinear.from_quantized(layer))
    force_kernel(model, kernel)
    return len(layers)


def force_kernel(model: nn.Module, kernel: str) -> None:
    """Has every packed layer use a kernel; one that cannot take a layer leaves that at "auto".

    Raises:
        UserError: if it takes no layer.
    """
    if kernel == "auto":
        return
    serving = [layer for layer in packed_layers(model).values() if kernel in layer.serving()]
    if not serving:
        raise UserError(f"kernel={kernel!r} takes no layer of this model: accepted is auto")
    for layer in serving:
        layer.kernel = kernel


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers by full name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, PackedLinear)}


def kernels_used(model: nn.Module) -> dict[str, int]:
    """Kernel to how many calls of packed layers it served so far."""
    return dict(sum((layer.used for layer in packed_layers(model).values()), Counter[str]()))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; shared ones count once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())

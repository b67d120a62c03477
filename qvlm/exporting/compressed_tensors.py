"""One packed layer in the format of compressed-tensors: its tensors and the scheme they follow.

Codes, scales and zero points stay what they are; only their places change. There are two layouts:
`pack-quantized` keeps the stream of bits of a row in int32 words, and its zero points are packed
along the rows. `int-quantized` keeps a code in a byte, and counts codes from -2^(bits - 1).

Source: https://github.com/vllm-project/compressed-tensors, version 0.20.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qvlm.errors import UserError
from qvlm.packing.form import Form
from qvlm.packing.formats import pack, unpack

BYTES, PACKED = LAYOUTS = "int-quantized", "pack-quantized"
_WORD = 4  # bytes
_TOKENS = "quantizer.vision.granularity=per_token"
_UNSORTED = "quantizer=per_token or quantizer=per_tensor"
# What reaches an expert is [tokens, in], and the library takes the first two dimensions for tokens.
_ROUTED = "the library takes one range for all tokens of an expert"


def require_expressible(name: str, form: Form) -> None:
    """Refuses a layer that the format cannot express.

    Args:
        name: Full name of the layer, for the message.
        form: What the layer stores.

    Raises:
        UserError: If there is no way to write it.
    """
    static = form.inputs == "static"
    ragged = form.in_features % form.group_size != 0
    obstacles = (
        (form.weight != "uniform", "its weight is NormalFloat", "another method"),
        (form.hadamard, "its input passes a Hadamard transform", "a method without one"),
        (form.ordered, "its channels are sorted into clusters", _UNSORTED),
        (form.inputs == "position", "each position of its input has a static scale", _TOKENS),
        (static and form.input_shape, "each channel of its input has a static scale", _UNSORTED),
        (not static and form.ratio != 1, "its ranges are shrunk", "quantizer.ranges=minmax"),
        (not static and "experts" in name.split("."), _ROUTED, "quantizer=per_tensor"),
        (ragged, f"{form.group_size} does not divide {form.in_features} inputs", "another group"),
    )
    for there, obstacle, remedy in obstacles:
        if there:
            raise UserError(
                f"export: compressed-tensors cannot express {name}: {obstacle}. Choose {remedy}."
            )


def scheme(form: Form, symmetric: bool, layout: str) -> dict[str, Any]:
    """Returns how a layer is quantized, as a group of `config_groups` says it.

    Args:
        form: What the layer stores.
        layout: One of `LAYOUTS`.
        symmetric: Whether all its zero points are the middle code.
    """
    grouped = form.group_size < form.in_features
    weights = {
        "num_bits": form.weight_bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": form.group_size if grouped else None,
        "dynamic": False,
    }
    dynamic = form.inputs == "token"
    inputs = {
        "num_bits": form.input_bits,
        "type": "int",
        "symmetric": False,
        "strategy": "token" if dynamic else "tensor",
        "group_size": None,
        "dynamic": dynamic,
    }
    return {
        "format": layout,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }


def is_symmetric(form: Form, zero_point: Tensor) -> bool:
    """Whether all zero points of a weight are the middle code."""
    return bool((zero_point == 2 ** (form.weight_bits - 1)).all())


def layer_tensors(form: Form, numbers: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Returns the tensors of a layer by the ends of their names.

    Args:
        form: What the layer stores; `require_expressible` accepts it.
        numbers: Its buffers by name, as a packed checkpoint holds them.
        layout: One of `LAYOUTS`.
    """
    rows = (form.out_features, form.scale_shape[1])
    found = {"weight_scale": _floats(numbers["scale"]).expand(rows).contiguous()}
    if layout == BYTES:
        codes = unpack(numbers["codes"], form.weight_bits, form.in_features)
        found["weight"] = _signed(codes, form.weight_bits)
    else:
        found["weight_packed"] = _words(numbers["codes"])
        found["weight_shape"] = torch.tensor([form.out_features, form.in_features])
    if not is_symmetric(form, numbers["zero_point"]):
        zero_point = numbers["zero_point"].expand(rows).contiguous()
        found["weight_zero_point"] = _zero_points(zero_point, form.weight_bits, layout)
    if form.inputs == "static":
        found["input_scale"] = _floats(numbers["input_scale"]).view(1)
        found["input_zero_point"] = _signed(numbers["input_zero_point"], form.input_bits).view(1)
    if form.bias:
        found["bias"] = _floats(numbers["bias"])
    return found


def _zero_points(zero_point: Tensor, bits: int, layout: str) -> Tensor:
    """Zero points [out, groups]: int8, or packed along the rows."""
    if layout == BYTES:
        return _signed(zero_point, bits)
    return _words(pack(zero_point.T.contiguous(), bits)).T.contiguous()


def _words(packed: Tensor) -> Tensor:
    """Rows of bytes as rows of int32 words, filled with zeros."""
    return F.pad(packed, (0, -packed.shape[1] % _WORD)).contiguous().view(torch.int32)


def _signed(codes: Tensor, bits: int) -> Tensor:
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def _floats(bits: Tensor) -> Tensor:
    return bits.view(torch.float32)

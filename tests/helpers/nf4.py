"""NF4 as bitsandbytes computes it on a CPU, the oracle of the NormalFloat quantizer."""

from unittest.mock import patch

import torch
from bitsandbytes import functional as bnb
from torch import Tensor


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """bitsandbytes' NF4 codes and dequantized values of x, of its shape.

    It gets the weight flattened: its CPU kernel takes a wrong absmax for the rows of a matrix
    whose width is no multiple of the block. And not compiled, which it tries for odd sizes. The
    mean of its absmax values is summed in float64 here: in float32, as bitsandbytes does it, its
    last bit depends on the instruction set.
    """
    mean = Tensor.mean
    with (
        torch.compiler.set_stance("force_eager"),
        patch.object(Tensor, "mean", lambda absmax: mean(absmax.double()).float()),
    ):
        packed, state = bnb.quantize_4bit(x.flatten(), quant_type="nf4", compress_statistics=True)
        values = bnb.dequantize_4bit(packed, state)
    bytes_ = packed.flatten()
    codes = torch.stack([bytes_ >> 4, bytes_ & 15], dim=1).flatten()[: x.numel()]
    return codes.view(x.shape), values.view(x.shape)

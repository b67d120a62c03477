"""Activation scales of positions, as the vision tower of Q-VLM's released code has them.

A vision tower reads as many tokens of every image: the class token and one per patch. So a scale of
a token can be calibrated for its position and stored, where a scale per token has to be made while
the model runs. The released code (arXiv 2410.08119, revision 191bdc9) keeps 257 of them for CLIP's
tower, of minimum and maximum. They rely on tokens of one position being alike in all images, as
scales that are made in the call do not.
"""

import torch
from torch import Tensor

from qvlm.errors import UserError
from qvlm.quantization.quantizer import UniformQuantizer, affine_grid


class PositionQuantizer(UniformQuantizer):
    """Uniform quantization with a stored scale for each position of a sequence of fixed length.

    `x` is [..., positions, features], or [tokens, features] with the tokens of whole sequences one
    after the other.

    Args:
        bits: Number of bits, 2 to 8.
        scale: Positive, finite steps, [positions, 1].
        zero_point: Integers in 0 .. 2^bits - 1, [positions, 1].
    """

    def __init__(self, bits: int, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__(bits, scale, zero_point)

    @classmethod
    def from_ends(cls, lo: Tensor, hi: Tensor, bits: int) -> "PositionQuantizer":
        """Makes the quantizer of the ranges [lo, hi] of each position, both [positions]."""
        return cls(bits, *affine_grid(lo[:, None], hi[:, None], bits))

    def quantize(self, x: Tensor) -> Tensor:
        return super().quantize(self._sequences(x)).view(x.shape)

    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return super().dequantize(self._sequences(codes), dtype).view(codes.shape)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self._sequences(x)).view(x.shape)

    def centered(self, x: Tensor) -> Tensor:
        return super().centered(self._sequences(x)).view(x.shape)

    def group_index(self, x: Tensor) -> Tensor:
        index = torch.arange(len(self.scale), device=x.device)[:, None]
        return index.repeat(len(x) // len(self.scale), 1) if x.ndim == 2 else index

    def extra_repr(self) -> str:
        return f"bits={self.bits}, positions={len(self.scale)}"

    def _sequences(self, x: Tensor) -> Tensor:
        """Returns `x` as [..., positions, features]."""
        require_positions(x, len(self.scale))
        return x.unflatten(0, (-1, len(self.scale))) if x.ndim == 2 else x.contiguous()


def require_positions(x: Tensor, positions: int) -> None:
    """Refuses an input that does not consist of sequences of the length of calibration.

    Args:
        x: Input [..., tokens, features], or [tokens, features] of sequences one after the other.
        positions: Number of tokens of a sequence.

    Raises:
        UserError: If it has other sequences.
    """
    tokens = x.shape[-2]
    if tokens != positions and (x.ndim != 2 or tokens % positions):
        raise UserError(
            f"granularity=per_position has ranges of {positions} positions, and the input has "
            f"{tokens}. Choose one of: per_tensor, per_token"
        )

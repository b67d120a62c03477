"""Activation scales that the released code of Q-VLM makes while the model runs.

It (arXiv 2410.08119, revision 191bdc9) keeps a minimum and a maximum per channel of the prompt at
hand, and widens them by each token that is decoded, so that nothing is ever clipped. All linears do
so whose input is not 4,096 wide, and thus every linear of a 13B model. The paper describes static
ranges.

Such scales differ by channel and by prompt. Static scales per channel can be folded into the weight
before it is quantized; these cannot, so no sum of integers computes the product, and there is no
packed form. What they give is what simulated numbers give, not a model that runs in 4 bits.
"""

import torch
from torch import Tensor

from qvlm.quantization.quantizer import Quantizer, UniformQuantizer


class PromptQuantizer(Quantizer):
    """Uniform quantization with a scale per sequence and channel, widened while decoding.

    A call with several tokens is a prompt and begins anew. A call with one token per sequence,
    after a call with as many sequences, continues them. Padding counts like any token: the released
    code answers one question at a time. Not for experts, which read tokens of no one prompt.

    Args:
        bits: Number of bits, 2 to 8.
    """

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self._ends: tuple[Tensor, Tensor] | None = None

    def for_tokens(self, x: Tensor) -> UniformQuantizer:
        """Makes the static quantizer of these tokens, and keeps their ranges for those after them.

        Args:
            x: Activations [sequences, tokens, features] or [tokens, features].

        Returns:
            Quantizer with scales [sequences, 1, features] or [1, features].
        """
        seen = x.detach().float()
        lo, hi = seen.amin(-2, keepdim=True), seen.amax(-2, keepdim=True)
        before = self._ends
        if before is not None and x.ndim == 3 and x.shape[1] == 1 and before[0].shape == lo.shape:
            lo, hi = torch.minimum(lo, before[0]), torch.maximum(hi, before[1])
        self._ends = lo, hi
        return UniformQuantizer.from_range(lo, hi, self.bits)

    def quantize(self, x: Tensor) -> Tensor:
        return self.for_tokens(x).quantize(x)

    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Raises TypeError, since the scales are those of a prompt: use `for_tokens(x)`."""
        raise TypeError(
            "a per-prompt quantizer stores no scales: use for_tokens(x).dequantize(codes)"
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.for_tokens(x)(x)

    def group_index(self, x: Tensor) -> Tensor:
        sequences = x.shape[:-2].numel()
        index = torch.arange(sequences * x.shape[-1], device=x.device)
        return index.view(*x.shape[:-2], 1, x.shape[-1])

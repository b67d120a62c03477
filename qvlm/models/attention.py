"""Attention of a single token on a CPU in bf16, where PyTorch's fused kernel is slow.

While an answer is decoded, each token attends to everything before it: a product of one row. For
the 620 positions of a LLaVA-13B layer in bf16 the fused kernel of `scaled_dot_product_attention`
(PyTorch 2.13, two threads) takes 2.9 ms, two plain products with a softmax between them 0.9 to 1.2;
the packed linears of that layer take 5 to 6. In float32 both take as long, and where there are few
keys, or many queries, the fused kernel wins.

So this is transformers' `sdpa` but for such calls, which get transformers' own `eager`. Both are
within the rounding of bf16 of each other. Left out: anything of ours.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

NAME = "sdpa_or_eager"
# Elements of the keys from which plain products are faster.
MANY_KEYS = 2**18


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers, by the rule above.

    Args:
        module: the attention layer; says how many heads share keys and values.
        query: [batch, heads, queries, width].
        key, value: [batch, key heads, keys, width].
        attention_mask: true where a key may be attended to, [batch, 1, queries, keys]; None if
            every key may.
        options: what the layer passes on, `scaling` and `dropout` among it.

    Returns:
        The output [batch, queries, heads, width], and weights if they were made.
    """
    one = query.shape[2] == 1 and key.numel() >= MANY_KEYS
    if not one or query.dtype != torch.bfloat16 or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        added = torch.zeros_like(attention_mask, dtype=query.dtype)
        attention_mask = added.masked_fill_(~attention_mask, lowest)
    return eager_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)

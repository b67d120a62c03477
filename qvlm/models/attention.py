"""Attention of a single token on a CPU in bf16, where PyTorch's fused kernel is slow.

While an answer is decoded, each token attends to everything before it, which is a product of one
row. For the 620 positions of a LLaVA-13B layer in bf16 the fused kernel of
`scaled_dot_product_attention` (PyTorch 2.13, two threads) takes 2.9 ms. Two plain products with a
softmax between them take 0.9 to 1.2 ms, beside 5 to 6 ms for the packed linears of that layer. In
float32 both take equally long, and with few keys or many queries the fused kernel is faster.

This module therefore calls transformers' `sdpa`, except for such calls, which go to transformers'
`eager`. Their results agree within the rounding of bf16. There is no attention code of our own.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

NAME = "sdpa_or_eager"
# Number of elements in the keys from which plain products are faster.
MANY_KEYS = 2**18


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Computes attention by the rule above; an attention function of transformers.

    Args:
        module: Attention layer, which says how many heads share keys and values.
        query: Queries [batch, heads, queries, width].
        key, value: Keys and values [batch, key heads, keys, width].
        attention_mask: Mask [batch, 1, queries, keys] that is true where a query may attend to a
            key; None allows every key.
        options: Further arguments of the layer, such as `scaling` and `dropout`.

    Returns:
        Output [batch, queries, heads, width], and the attention weights if they were computed.
    """
    one_query = query.shape[2] == 1 and key.numel() >= MANY_KEYS
    if not one_query or query.dtype != torch.bfloat16 or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        added = torch.zeros_like(attention_mask, dtype=query.dtype)
        attention_mask = added.masked_fill_(~attention_mask, lowest)
    return eager_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)

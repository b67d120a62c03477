"""Attention of single tokens on a CPU, where the operators of PyTorch are slow.

While an answer is decoded, each token attends to everything before it, which reads all keys and
values once and computes little. For the 600 positions of a LLaVA-13B layer in bf16 that are 12 MB.
`attend` of native_attention.h reads them at the speed of memory, whatever the strides of the cache;
two plain products with a softmax between them take about twice as long, and four times where keys
are part of a longer cache (`growing_cache`), because PyTorch copies them. Its scores are in float32
and only the output is rounded.

This module therefore calls transformers' `sdpa`, except for such calls. `sdpa` serves them too
where there is no compiler, and for models in float64, whose digits are those of every machine.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qvlm.packing.kernels import native_library as library

NAME = "sdpa_or_native"
# Options of a layer that are heeded here, or that mean nothing for a single query.
_WITHOUT_EFFECT = frozenset({"scaling", "use_cache", "position_ids", "is_causal"})


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
    if not _is_served(query, key, value, attention_mask, options):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    mask = None if attention_mask is None else attention_mask[:, 0, 0]
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    output = library.attend(query[:, :, 0], key, value, mask, scale)
    return output[:, None], None


def _is_off(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and value == 0)


def _is_served(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: Mapping[str, Any],
) -> bool:
    """Whether `attend` of the library computes this call."""
    if query.shape[2] != 1 or query.device.type != "cpu":
        return False
    if any(name not in _WITHOUT_EFFECT and not _is_off(value) for name, value in options.items()):
        return False
    width, types = query.shape[3], {query.dtype, key.dtype, value.dtype}
    if types not in ({torch.bfloat16}, {torch.float32}) or width % 16 or width > library.MAX_HEAD:
        return False
    if mask is not None and (mask.dtype != torch.bool or mask.shape[1:] != (1, 1, key.shape[2])):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return False
    neighbors = key.stride(3) == value.stride(3) == 1 and value.shape[3] == width
    return neighbors and library.obstacle() is None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)

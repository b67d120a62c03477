"""A LLaMA on a GPU with few launches, which a CUDA graph replays: packed, or in floating point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qvlm.errors import RunError, UserError
from qvlm.packing.decoder import launches
from qvlm.packing.decoder.joined import join


class Decoder:
    """A language model with a cache for a number of sequences of equal length.

    Args:
        model: LLaVA on a GPU whose language model is a LLaMA. Its joined layers share memory with
            the decoder afterwards.
        batch: Number of sequences.
        length: Number of positions that the cache holds for each.

    Attributes:
        ids: Tokens that come next, [batch].
        logits: Logits of the last position, [batch, vocabulary].

    Raises:
        UserError: If the language model is not a LLaMA.
    """

    def __init__(self, model: Any, batch: int, length: int) -> None:
        text = model.model.language_model
        config = text.config
        if type(text).__name__ != "LlamaModel":
            raise UserError(f"{type(text).__name__} is not a LlamaModel. Choose a LLaVA with one.")
        self.batch, self.length = batch, length
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.epsilon = config.rms_norm_eps
        self.embedding, self.head, self.norm = text.embed_tokens, model.lm_head, text.norm.weight
        device, dtype = self.norm.device, self.norm.dtype
        self.layers = [
            (
                layer.input_layernorm.weight,
                join([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
                join([layer.self_attn.o_proj]),
                layer.post_attention_layernorm.weight,
                join([layer.mlp.gate_proj, layer.mlp.up_proj]),
                join([layer.mlp.down_proj]),
            )
            for layer in text.layers
        ]
        shape = (len(self.layers), batch, kv_heads, length, width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        # Cosine and sine of all positions, as the model computes them.
        places = torch.arange(length, device=device)[None]
        cosine, sine = text.rotary_emb(torch.zeros(1, dtype=dtype, device=device), places)
        self.angles = cosine[0].contiguous(), sine[0].contiguous()
        self.position = torch.zeros(1, dtype=torch.int32, device=device)
        self.ids = torch.zeros(batch, dtype=torch.long, device=device)
        self.logits = torch.zeros(batch, config.vocab_size, dtype=dtype, device=device)
        # Enough programs for every multiprocessor.
        self.splits = max(1, min(-(-length // launches.KEYS), -(-512 // (batch * heads))))

    @torch.no_grad()
    def read(self, embedded: Tensor) -> None:
        """Reads a prompt [batch, tokens, hidden] from position 0 on; sets `ids` and `logits`."""
        self.position.zero_()
        self._run(embedded)
        self.position.add_(embedded.shape[1])

    @torch.no_grad()
    def step(self) -> None:
        """Reads `ids` at the next position, and sets `ids` and `logits` to those that follow."""
        self._run(self.embedding(self.ids)[:, None])
        self.position.add_(1)

    def check(self) -> None:
        """Raises a RunError if the logits are not finite, or the cache was too short."""
        if int(self.position) > self.length:
            raise RunError(
                f"{int(self.position)} positions do not fit in a cache of {self.length}."
            )
        if not bool(torch.isfinite(self.logits).all()):
            raise RunError("The logits are not finite.")

    def _run(self, embedded: Tensor) -> None:
        batch, tokens, hidden = embedded.shape
        x = embedded.reshape(batch * tokens, hidden).clone()
        delta: Tensor | None = None
        for index, (norm, qkv, out, norm_after, gate_up, down) in enumerate(self.layers):
            x, projected = qkv.normed(x, delta, norm, self.epsilon)
            (delta,) = out(self._attend(index, projected, tokens))
            x, (gate, up) = gate_up.normed(x, delta, norm_after, self.epsilon)
            (delta,) = down.gated(gate, up)
        if tokens > 1:  # only the last token's logits are needed
            x = x.view(batch, tokens, hidden)[:, -1].contiguous()
            if delta is not None:
                delta = delta.view(batch, tokens, hidden)[:, -1].contiguous()
        logits = self.head(launches.add_norm(x, delta, self.norm, self.epsilon))
        self.logits.copy_(logits)
        self.ids.copy_(logits.argmax(1))

    def _attend(self, index: int, projected: Sequence[Tensor], tokens: int) -> Tensor:
        """Returns the attention of a layer, [batch * tokens, hidden]."""
        q, k, v = projected
        keys, values = self.keys[index], self.values[index]
        rotated = launches.rotate_into_cache(
            q, k, v, self.angles, self.position, keys, values, tokens
        )
        if tokens == 1:
            return launches.attend(rotated, keys, values, self.position, self.splits)
        kept = keys[:, :, :tokens], values[:, :, :tokens]
        shared = rotated.shape[1] != keys.shape[1]
        found = F.scaled_dot_product_attention(rotated, *kept, is_causal=True, enable_gqa=shared)
        return found.transpose(1, 2).reshape(self.batch * tokens, -1)

"""A LLaMA on a GPU with few launches, which a CUDA graph replays: packed, or in floating point.

Decoding a token is a few hundred short launches, and what lies between them costs as much as the
products of a packed model. So this runs a decoder of transformers' `LlamaModel` with

- a cache that is there from the beginning and is written in place, at a position that lies on the
  device, so that one graph serves every token;
- queries, keys and values in one product, and gate and up in one, where their inputs are quantized
  alike (`join`);
- a kernel each for residual and norm, rotary embedding and cache, attention of a token over the
  cache (split among programs, then combined), and the gated activation.

A full-precision model runs the same way, with cuBLAS' products, so that a comparison of both
compares their products. Values are rounded where transformers rounds them.

Left out: anything but LLaMA's decoder, sampling, sequences of different lengths, and prompts after
the first.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvlm.errors import RunError, UserError
from qvlm.packing import triton_products
from qvlm.packing.layer import PackedLinear
from qvlm.packing.triton_kernels import _jit, tl, triton
from qvlm.packing.triton_products import _wait, overlapping

_KEYS = 64  # of a step of attention


class Decoder:
    """A language model with room for a number of sequences of equal length.

    Args:
        model: a LLaVA whose language model is a LLaMA, on a GPU. Its joined layers share memory
            with it afterwards.
        batch: sequences.
        length: positions that the cache holds for each.

    Attributes:
        ids: the tokens that come next, [batch].
        logits: of the last position, [batch, vocabulary].

    Raises:
        UserError: if the language model is not a LLaMA.
    """

    def __init__(self, model: Any, batch: int, length: int) -> None:
        text = model.model.language_model
        config = text.config
        if type(text).__name__ != "LlamaModel":
            raise UserError(f"{type(text).__name__} is not a LlamaModel. Choose a LLaVA with one.")
        self.batch, self.length = batch, length
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
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
        shape = (len(self.layers), batch, self.kv_heads, length, self.width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        # The angles of all positions, as the model makes them.
        places = torch.arange(length, device=device)[None]
        angles = text.rotary_emb(torch.zeros(1, dtype=dtype, device=device), places)
        self.cosine, self.sine = (part[0].contiguous() for part in angles)
        self.at = torch.zeros(1, dtype=torch.int32, device=device)
        self.ids = torch.zeros(batch, dtype=torch.long, device=device)
        self.logits = torch.zeros(batch, config.vocab_size, dtype=dtype, device=device)
        # Enough programs for every multiprocessor.
        pairs = batch * self.heads
        self.splits = max(1, min(-(-length // _KEYS), -(-512 // pairs)))

    @torch.no_grad()
    def read(self, embedded: Tensor) -> None:
        """Reads a prompt [batch, tokens, hidden] from position 0 on; sets `ids` and `logits`."""
        self.at.zero_()
        self._run(embedded)
        self.at.add_(embedded.shape[1])

    @torch.no_grad()
    def step(self) -> None:
        """Reads `ids`, at the next position, and sets those that follow."""
        self._run(self.embedding(self.ids)[:, None])
        self.at.add_(1)

    def check(self) -> None:
        """Raises a RunError if the logits are not finite, or the cache was too short."""
        if int(self.at) > self.length:
            raise RunError(f"{int(self.at)} positions do not fit in a cache of {self.length}")
        if not bool(torch.isfinite(self.logits).all()):
            raise RunError("the logits are not finite")

    def _run(self, embedded: Tensor) -> None:
        batch, tokens, hidden = embedded.shape
        x = embedded.reshape(batch * tokens, hidden).clone()
        delta = None
        for index, (norm, qkv, out, norm_after, gate_up, down) in enumerate(self.layers):
            x, read = self._normed(x, delta, norm, qkv)
            (delta,) = out(self._attend(index, read, batch, tokens))
            x, (gate, up) = self._normed(x, delta, norm_after, gate_up)
            (delta,) = _gated_into(down, gate, up)
        if tokens > 1:  # only the last one's logits
            x = x.view(batch, tokens, hidden)[:, -1].contiguous()
            delta = None if delta is None else delta.view(batch, tokens, hidden)[:, -1].contiguous()
        logits = self.head(add_norm(x, delta, self.norm, self.epsilon))
        self.logits.copy_(logits)
        self.ids.copy_(logits.argmax(1))

    def _normed(
        self, x: Tensor, delta: Tensor | None, weight: Tensor, reader: Joined
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """x + delta, and what a reader makes of its norm."""
        if reader.grid is None or reader.packed is None:
            return x, reader(add_norm(x, delta, weight, self.epsilon))
        layout = reader.packed.input_layout()
        x, q, sums = triton_products.quantize_normed(
            x, delta, weight, self.epsilon, *reader.grid, **layout
        )
        return x, reader.multiply(q, sums, x.dtype)

    def _attend(self, index: int, qkv: Sequence[Tensor], batch: int, tokens: int) -> Tensor:
        q, k, v = qkv
        keys, values = self.keys[index], self.values[index]
        turned = torch.empty(batch, self.heads, tokens, self.width, dtype=q.dtype, device=q.device)
        with torch.cuda.device_of(q):
            _rotate[(batch * tokens, self.heads + 2 * self.kv_heads)](
                q, k, v, q.stride(0), k.stride(0), v.stride(0), self.cosine, self.sine,
                self.at, turned, keys, values, tokens, self.heads, self.kv_heads, self.length,
                WIDTH=self.width, HALF=triton.next_power_of_2(self.width // 2), num_warps=1,
                **overlapping(q.device),
            )  # fmt: skip
        rows, hidden = batch * tokens, self.heads * self.width
        if tokens > 1:
            shared = self.heads != self.kv_heads
            kept = keys[:, :, :tokens], values[:, :, :tokens]
            found = F.scaled_dot_product_attention(turned, *kept, is_causal=True, enable_gqa=shared)
            return found.transpose(1, 2).reshape(rows, hidden)
        pairs, width = batch * self.heads, triton.next_power_of_2(self.width)
        partial = torch.empty(pairs, self.splits, self.width + 2, device=q.device)
        found = torch.empty(rows, hidden, dtype=q.dtype, device=q.device)
        with torch.cuda.device_of(q):
            _attend_split[(pairs, self.splits)](
                turned, keys, values, partial, self.at, self.heads, self.kv_heads, self.length,
                self.width**-0.5, SPLITS=self.splits, WIDTH=self.width, BLOCK=width, KEYS=_KEYS,
                num_warps=4, **overlapping(q.device),
            )  # fmt: skip
            _combine[(pairs,)](
                partial, found, SPLITS=self.splits, MANY=triton.next_power_of_2(self.splits),
                WIDTH=self.width, BLOCK=width, num_warps=1, **overlapping(q.device),
            )  # fmt: skip
        return found


class Joined:
    """What runs linears that read the same input, in one product if they can share it.

    Attributes:
        packed: the packed layer that computes all of them, or None.
        grid: of its static input, where the quantization may be part of what makes it; or None.
    """

    def __init__(
        self, run: Callable[[Tensor], Sequence[Tensor]], sizes: Sequence[int], packed: Any = None
    ) -> None:
        self.run, self.sizes = run, list(sizes)
        self.packed: PackedLinear | None = packed
        self.grid = None if packed is None else packed.static_grid()

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """Maps [rows, in] to [rows, out] of each linear."""
        return self.run(x)

    def multiply(self, q: Tensor, sums: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        """The same of an input that `triton_products` has quantized."""
        packed, grid = self.packed, self.grid
        assert packed is not None and grid is not None
        bias = None if packed.bias is None else packed.bias.view(torch.float32)
        return packed.multiply(q, sums, grid, dtype, bias).split(self.sizes, 1)


def join(layers: Sequence[nn.Module]) -> Joined:
    """Joins linears that read the same input.

    Joined layers keep working; they hold parts of the joined memory. Packed layers are joined if
    they quantize their input alike. NormalFloat weights are not, since each has a mean of its own.
    """
    sizes = [int(layer.out_features) for layer in layers]  # type: ignore[arg-type]
    if all(isinstance(layer, nn.Linear) for layer in layers):
        weight, bias = _shared(layers, "weight"), _shared(layers, "bias")
        return Joined(lambda x: F.linear(x, weight, bias).split(sizes, 1), sizes)  # type: ignore
    packed = [layer for layer in layers if isinstance(layer, PackedLinear)]
    first = packed[0] if packed else None
    if first is not None and len(layers) == 1:
        return Joined(lambda x: [first(x)], sizes, first)
    if first is None or len(packed) < len(layers) or not all(map(first.reads_alike, packed)):
        return Joined(lambda x: [layer(x) for layer in layers], sizes)
    scales = tuple(first.form.scale_shape)
    shape = (sum(sizes), *scales[1:])
    joined = PackedLinear(replace(first.form, out_features=sum(sizes), scale_shape=shape))
    for name in ("codes", "scale", "zero_point", "bias"):
        setattr(joined, name, _shared(packed, name))
    for name in ("input_scale", "input_zero_point", "order"):
        if name in first._buffers:
            setattr(joined, name, getattr(first, name))
    joined.kernel = first.kernel
    return Joined(lambda x: joined(x).split(sizes, 1), sizes, joined)


def _gated_into(reader: Joined, gate: Tensor, up: Tensor) -> Sequence[Tensor]:
    """What a reader makes of silu(gate) * up."""
    if reader.grid is None or reader.packed is None:
        return reader(gated(gate, up))
    layout = reader.packed.input_layout()
    q, sums = triton_products.quantize_gated(gate, up, *reader.grid, **layout)
    return reader.multiply(q, sums, gate.dtype)


def _shared(layers: Sequence[nn.Module], name: str) -> Tensor | None:
    """The tensors of this name one above the other; each layer then holds its part of them."""
    parts = [getattr(layer, name) for layer in layers]
    if len(parts) == 1:
        return parts[0]
    if any(part is None for part in parts):
        return None
    joined = torch.cat([part.detach() for part in parts])
    for layer, part in zip(layers, joined.split([len(part) for part in parts]), strict=True):
        parameter = isinstance(getattr(layer, name), nn.Parameter)
        setattr(layer, name, nn.Parameter(part, requires_grad=False) if parameter else part)
    return joined


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    """The RMS norm of x + delta, [rows, hidden]; `x` is then that sum."""
    rows, width = x.shape
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _add_norm[(rows,)](
            x,
            delta,
            weight,
            y,
            width,
            epsilon,
            ADD=delta is not None,
            BLOCK=triton.next_power_of_2(width),
            num_warps=8,
            **overlapping(x.device),
        )
    return y


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [rows, width]; rows of either may lie apart."""
    rows, width = gate.shape
    y = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    with torch.cuda.device_of(gate):
        _gated[(rows, triton.cdiv(width, 1024))](
            gate, up, gate.stride(0), up.stride(0), y, width, BLOCK=1024, **overlapping(gate.device)
        )
    return y


@_jit
def _add_norm(x_at, delta_at, weight_at, y_at, width, epsilon, ADD: tl.constexpr,
              BLOCK: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    _wait(OVERLAP)
    kind = x_at.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_at + at + column, mask=inside, other=0).to(tl.float32)
    if ADD:
        x += tl.load(delta_at + at + column, mask=inside, other=0).to(tl.float32)
        x = x.to(kind)
        tl.store(x_at + at + column, x, mask=inside)
        x = x.to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 0) / width + epsilon)
    weight = tl.load(weight_at + column, mask=inside, other=0)
    tl.store(y_at + at + column, (x.to(kind) * weight).to(kind), mask=inside)


@_jit
def _gated(gate_at, up_at, gate_stride, up_stride, y_at, width, BLOCK: tl.constexpr,
           OVERLAP: tl.constexpr):  # fmt: skip
    _wait(OVERLAP)
    kind = y_at.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_at + row * gate_stride + column, mask=inside, other=0).to(tl.float32)
    up = tl.load(up_at + row * up_stride + column, mask=inside, other=0)
    gate = (gate * tl.sigmoid(gate)).to(kind)
    tl.store(y_at + row * width + column, (gate * up).to(kind), mask=inside)


@_jit
def _rotate(q_at, k_at, v_at, q_stride, k_stride, v_stride, cosine_at, sine_at, at_at, turned_at,
            keys_at, values_at, tokens, heads, kv_heads, length, WIDTH: tl.constexpr,
            HALF: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """A head of a token: queries are turned, keys turned and kept, values kept."""
    _wait(OVERLAP)
    kind = turned_at.dtype.element_ty
    row, head = tl.program_id(0), tl.program_id(1)
    token, sequence = row % tokens, (row // tokens).to(tl.int64)
    position = tl.load(at_at) + token
    low = tl.arange(0, HALF)
    inside = (low < WIDTH // 2) & (position + 0 * low < length)
    high = low + WIDTH // 2
    kv = tl.where(head < heads + kv_heads, head - heads, head - heads - kv_heads)
    kept = ((sequence * kv_heads + kv) * length + position) * WIDTH
    if head >= heads + kv_heads:
        source = v_at + row.to(tl.int64) * v_stride + kv * WIDTH
        tl.store(values_at + kept + low, tl.load(source + low, mask=inside, other=0), mask=inside)
        tl.store(values_at + kept + high, tl.load(source + high, mask=inside, other=0), mask=inside)
    else:
        source = q_at + row.to(tl.int64) * q_stride + head * WIDTH
        target = turned_at + ((sequence * heads + head) * tokens + token) * WIDTH
        if head >= heads:
            source = k_at + row.to(tl.int64) * k_stride + kv * WIDTH
            target = keys_at + kept
        a = tl.load(source + low, mask=inside, other=0)
        b = tl.load(source + high, mask=inside, other=0)
        angle = position * WIDTH
        cosine = tl.load(cosine_at + angle + low, mask=inside, other=0)
        sine = tl.load(sine_at + angle + low, mask=inside, other=0)
        first = (a * cosine).to(kind) - (b * sine).to(kind)
        second = (b * cosine).to(kind) + (a * sine).to(kind)
        tl.store(target + low, first.to(kind), mask=inside)
        tl.store(target + high, second.to(kind), mask=inside)


@_jit
def _attend_split(q_at, keys_at, values_at, partial_at, at_at, heads, kv_heads, length, scaling,
                  SPLITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                  KEYS: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """A head's token over a share of its keys: weighted values, the largest score, the weight."""
    _wait(OVERLAP)
    pair, split = tl.program_id(0), tl.program_id(1)
    sequence, head = pair // heads, pair % heads
    count = tl.minimum(tl.load(at_at) + 1, length)
    share = tl.cdiv(tl.cdiv(count, SPLITS), KEYS) * KEYS
    begin = split * share
    end = tl.minimum(begin + share, count)
    column = tl.arange(0, BLOCK)
    within = column < WIDTH
    q = tl.load(q_at + pair * WIDTH + column, mask=within, other=0).to(tl.float32) * scaling
    row = (sequence * kv_heads + head // (heads // kv_heads)).to(tl.int64) * length
    largest, weight = -float("inf"), 0.0
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(begin, end, KEYS):
        key = first + tl.arange(0, KEYS)
        mask = (key < end)[:, None] & within[None, :]
        at = (row + key)[:, None] * WIDTH + column[None, :]
        k = tl.load(keys_at + at, mask=mask, other=0).to(tl.float32)
        v = tl.load(values_at + at, mask=mask, other=0).to(tl.float32)
        score = tl.where(key < end, tl.sum(k * q[None, :], 1), -float("inf"))
        now = tl.maximum(largest, tl.max(score, 0))
        share_of_old = tl.exp(largest - now)
        p = tl.exp(score - now)
        weight = weight * share_of_old + tl.sum(p, 0)
        total = total * share_of_old + tl.sum(p[:, None] * v, 0)
        largest = now
    at = partial_at + (pair * SPLITS + split) * (WIDTH + 2)
    tl.store(at + column, total, mask=within)
    tl.store(at + WIDTH, largest)
    tl.store(at + WIDTH + 1, weight)


@_jit
def _combine(partial_at, y_at, SPLITS: tl.constexpr, MANY: tl.constexpr, WIDTH: tl.constexpr,
             BLOCK: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """A head's output from those of its shares."""
    _wait(OVERLAP)
    pair = tl.program_id(0)
    split, column = tl.arange(0, MANY), tl.arange(0, BLOCK)
    there, within = split < SPLITS, column < WIDTH
    at = partial_at + (pair * SPLITS + split) * (WIDTH + 2)
    largest = tl.load(at + WIDTH, mask=there, other=-float("inf"))
    factor = tl.exp(largest - tl.max(largest, 0))
    weight = tl.sum(factor * tl.load(at + WIDTH + 1, mask=there, other=0), 0)
    mask = there[:, None] & within[None, :]
    parts = tl.load(at[:, None] + column[None, :], mask=mask, other=0)
    y = tl.sum(parts * factor[:, None], 0) / weight
    tl.store(y_at + pair * WIDTH + column, y.to(y_at.dtype.element_ty), mask=within)

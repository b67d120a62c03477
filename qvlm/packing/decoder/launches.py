"""Triton's kernels of a decoder step, and the functions that launch them.

Values are rounded to the model's type where transformers rounds them.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
from torch import Tensor

from qvlm.packing.kernels.triton_kernels import jit, tl, triton
from qvlm.packing.kernels.triton_launch import overlapping, wait

KEYS = 64  # number of keys that a step of attention reads at once


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    """Returns the RMS norm of x + delta, [rows, hidden], and leaves that sum in `x`.

    Args:
        x, delta: Tensors [rows, hidden]; without `delta`, the norm of `x`.
        weight: Weight of the norm, [hidden].
        epsilon: Number that the norm adds to the mean of squares.
    """
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
    """Returns silu(gate) * up, [rows, width]. Rows of either need not be adjacent in memory."""
    rows, width = gate.shape
    y = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    with torch.cuda.device_of(gate):
        _gated[(rows, triton.cdiv(width, 1024))](
            gate, up, gate.stride(0), up.stride(0), y, width, BLOCK=1024, **overlapping(gate.device)
        )
    return y


def rotate_into_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: tuple[Tensor, Tensor],
    position: Tensor,
    keys: Tensor,
    values: Tensor,
    tokens: int,
) -> Tensor:
    """Applies rotary embeddings, and writes keys and values to the cache.

    Args:
        q: Queries, [batch * tokens, heads * width].
        k, v: Keys and values, [batch * tokens, kv_heads * width].
        angles: Cosine and sine of every position, [length, width].
        position: Position of the first token, [1] int32 on the device.
        keys, values: Cache, [batch, kv_heads, length, width].
        tokens: Number of tokens of each sequence.

    Returns:
        Rotated queries, [batch, heads, tokens, width].
    """
    batch, kv_heads, length, width = keys.shape
    heads = q.shape[1] // width
    rotated = torch.empty(batch, heads, tokens, width, dtype=q.dtype, device=q.device)
    with torch.cuda.device_of(q):
        _rotate[(batch * tokens, heads + 2 * kv_heads)](
            q, k, v, q.stride(0), k.stride(0), v.stride(0), *angles,
            position, rotated, keys, values, tokens, heads, kv_heads, length,
            WIDTH=width, HALF=triton.next_power_of_2(width // 2), num_warps=1,
            **overlapping(q.device),
        )  # fmt: skip
    return rotated


def attend(q: Tensor, keys: Tensor, values: Tensor, position: Tensor, splits: int) -> Tensor:
    """Attends with one token per sequence to all positions of the cache up to its own.

    Args:
        q: Rotated queries, [batch, heads, 1, width].
        keys, values: Cache, [batch, kv_heads, length, width].
        position: Position of the token, [1] int32 on the device.
        splits: Number of programs that share the keys of a head.

    Returns:
        Output, [batch, heads * width].
    """
    (batch, heads, _, width), (kv_heads, length) = q.shape, keys.shape[1:3]
    pairs, block = batch * heads, triton.next_power_of_2(width)
    partial = torch.empty(pairs, splits, width + 2, device=q.device)
    found = torch.empty(batch, heads * width, dtype=q.dtype, device=q.device)
    with torch.cuda.device_of(q):
        _attend_split[(pairs, splits)](
            q, keys, values, partial, position, heads, kv_heads, length,
            width**-0.5, SPLITS=splits, WIDTH=width, BLOCK=block, KEYS=KEYS,
            num_warps=4, **overlapping(q.device),
        )  # fmt: skip
        _combine[(pairs,)](
            partial, found, SPLITS=splits, MANY=triton.next_power_of_2(splits),
            WIDTH=width, BLOCK=block, num_warps=1, **overlapping(q.device),
        )  # fmt: skip
    return found


@jit
def _add_norm(x_at, delta_at, weight_at, y_at, width, epsilon, ADD: tl.constexpr,
              BLOCK: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    wait(OVERLAP)
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


@jit
def _gated(gate_at, up_at, gate_stride, up_stride, y_at, width, BLOCK: tl.constexpr,
           OVERLAP: tl.constexpr):  # fmt: skip
    wait(OVERLAP)
    kind = y_at.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_at + row * gate_stride + column, mask=inside, other=0).to(tl.float32)
    up = tl.load(up_at + row * up_stride + column, mask=inside, other=0)
    gate = (gate * tl.sigmoid(gate)).to(kind)
    tl.store(y_at + row * width + column, (gate * up).to(kind), mask=inside)


@jit
def _rotate(q_at, k_at, v_at, q_stride, k_stride, v_stride, cosine_at, sine_at, at_at, rotated_at,
            keys_at, values_at, tokens, heads, kv_heads, length, WIDTH: tl.constexpr,
            HALF: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """One head of a token: rotates queries, rotates keys and stores them, and stores values."""
    wait(OVERLAP)
    kind = rotated_at.dtype.element_ty
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
        target = rotated_at + ((sequence * heads + head) * tokens + token) * WIDTH
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


@jit
def _attend_split(q_at, keys_at, values_at, partial_at, at_at, heads, kv_heads, length, scaling,
                  SPLITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                  KEYS: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Attends with one head to a part of its keys.

    Writes the sum of weighted values, the largest score, and the sum of weights.
    """
    wait(OVERLAP)
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
        kept_share = tl.exp(largest - now)
        p = tl.exp(score - now)
        weight = weight * kept_share + tl.sum(p, 0)
        total = total * kept_share + tl.sum(p[:, None] * v, 0)
        largest = now
    at = partial_at + (pair * SPLITS + split) * (WIDTH + 2)
    tl.store(at + column, total, mask=within)
    tl.store(at + WIDTH, largest)
    tl.store(at + WIDTH + 1, weight)


@jit
def _combine(partial_at, y_at, SPLITS: tl.constexpr, MANY: tl.constexpr, WIDTH: tl.constexpr,
             BLOCK: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Combines what one head found in each part of its keys."""
    wait(OVERLAP)
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

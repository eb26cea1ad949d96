"""What the forward and the backward kernels share: which keys a query sees, and the mathematics of one tile of scores.

Every pattern that the kernels know is an interval of keys for each query, seen from the other side an interval of
queries for each key: causal and window patterns, the sequences packed into a row, and padding at either end. Only a
key mask with holes needs more than that, and is read key by key.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def narrowed(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """float32 `x` in another dtype, rounded to nearest even, which Triton's interpreter (UPCAST) does not do itself."""
    if UPCAST and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def dot(a, b, total, UPCAST: tl.constexpr):
    """total + a b, with `a` in the dtype of `b`; float32 products are exact to float32 (never TF32).

    UPCAST is for Triton's interpreter, which multiplies the bits of bfloat16 as integers.
    """
    a = narrowed(a, b.dtype, UPCAST)
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def scaled_dot(a, b, scale, UPCAST: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """scale a b, [M, N] float32."""
    return dot(a, b, tl.zeros([M, N], tl.float32), UPCAST) * scale


@triton.jit
def capped(scores, softcap):
    """(softcap tanh(scores / softcap), tanh(scores / softcap)); libdevice's tanh does not exist in the interpreter."""
    x = scores / softcap
    decay = tl.math.exp2(tl.abs(x) * (-2.0 * LOG2E))
    tanh = (1.0 - decay) / (1.0 + decay)
    tanh = tl.where(x < 0, -tanh, tanh)
    # Near 0 the difference loses the digits that softcap brings back to the front: Cephes' polynomial.
    square = x * x
    small = ((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square + 1.33314422036e-1
    small = x + x * square * (small * square - 3.33332819422e-1)
    tanh = tl.where(square < 0.390625, small, tanh)
    return tanh * softcap, tanh


@triton.jit
def kept(seed, head, m, n, dropout):
    """Whether dropout keeps the weights of queries m and keys n: bool of m's and n's broadcast shape.

    Philox (Salmon et al. 2011) at the counter (key, query, head): the same in forward and backward, in any order.
    """
    n = (n + m * 0).to(tl.uint32)
    m = (m + n.to(tl.int32) * 0).to(tl.uint32)
    head = (head + m.to(tl.int32) * 0).to(tl.uint32)
    bits, _, _, _ = tl.philox(seed, n, m, head, head * 0)
    return (bits >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08 >= dropout


@triton.jit
def keys_of_queries(
    m,
    batch,
    BOUNDS,
    ROWS,
    KEY_MASK,
    stride_mask_b,
    stride_mask_s,
    queries,
    keys,
    window,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
):
    """[start, stop) of the keys that each query of `m` may see, but for holes in the key mask; start >= stop if none.

    BOUNDS holds, for every query of a packed row, the first key of its sequence, the one after the last, and the
    distance to the key that stands where the query stands. ROWS holds the same of a padded row.
    """
    inside = m < queries
    if PACKED:
        bounds = BOUNDS + batch.to(tl.int64) * 3 * queries + m
        start = tl.load(bounds, mask=inside, other=0)
        stop = tl.load(bounds + queries, mask=inside, other=0)
        own = m + tl.load(bounds + 2 * queries, mask=inside, other=0)
    else:
        start = m * 0
        stop = start + keys
        own = m + (keys - queries)
    if PADDED:
        start = tl.maximum(start, tl.load(ROWS + batch * 3))
        stop = tl.minimum(stop, tl.load(ROWS + batch * 3 + 1))
    if IS_CAUSAL:
        stop = tl.minimum(stop, own + 1)
        if PADDED:
            # The query's own token is padding: nothing reads what it gives.
            mask = KEY_MASK + batch.to(tl.int64) * stride_mask_b + own.to(tl.int64) * stride_mask_s
            real = tl.load(mask, mask=inside & (own >= 0) & (own < keys), other=0)
            stop = tl.where(real != 0, stop, 0)
    if HAS_WINDOW:
        start = tl.maximum(start, own - window + 1)
        if not IS_CAUSAL:
            stop = tl.minimum(stop, own + window)
    return start, tl.where(inside, stop, 0)


@triton.jit
def queries_of_keys(
    n,
    batch,
    BOUNDS,
    ROWS,
    KEY_MASK,
    stride_mask_b,
    stride_mask_s,
    queries,
    keys,
    window,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
):
    """[start, stop) of the queries that may see each key of `n`, but for queries that see nothing; exact otherwise."""
    inside = n < keys
    if PACKED:
        bounds = BOUNDS + batch.to(tl.int64) * 3 * keys + n
        start = tl.load(bounds, mask=inside, other=0)
        stop = tl.load(bounds + keys, mask=inside, other=0)
        own = n + tl.load(bounds + 2 * keys, mask=inside, other=0)
    else:
        start = n * 0
        stop = start + queries
        own = n + (queries - keys)
    if IS_CAUSAL:
        start = tl.maximum(start, own)
        if PADDED:
            # Queries that stand beyond the first or the last real key are padding and see nothing.
            start = tl.maximum(start, tl.load(ROWS + batch * 3) + own - n)
            stop = tl.minimum(stop, tl.load(ROWS + batch * 3 + 1) + own - n)
    if HAS_WINDOW:
        stop = tl.minimum(stop, own + window)
        if not IS_CAUSAL:
            start = tl.maximum(start, own - window + 1)
    if PADDED:
        mask = KEY_MASK + batch.to(tl.int64) * stride_mask_b + n.to(tl.int64) * stride_mask_s
        inside = inside & (tl.load(mask, mask=inside, other=0) != 0)
    return start, tl.where(inside, stop, 0)


@triton.jit
def span(start, stop, is_free, length, BLOCK: tl.constexpr):
    """How to walk over intervals [start, stop) in blocks that begin at multiples of BLOCK.

    Returns:
        (low, high, full_low, full_high): everything lies in [low, high), and every block of [full_low, full_high) lies
        in every interval, so that it needs no mask. `is_free` marks intervals that do not matter.
    """
    empty = start >= stop
    low = tl.min(tl.where(empty, length, start)) // BLOCK * BLOCK
    high = tl.max(tl.where(empty, 0, stop))
    full_low = (tl.max(tl.where(is_free, 0, start)) + BLOCK - 1) // BLOCK * BLOCK
    full_high = tl.min(tl.where(is_free, length, stop)) // BLOCK * BLOCK
    some = full_low < full_high
    # Without a full block, all blocks are in front of the (empty) full part.
    ceiling = low + (tl.maximum(high - low, 0) + BLOCK - 1) // BLOCK * BLOCK
    return low, high, tl.where(some, full_low, ceiling), tl.where(some, full_high, ceiling)


@triton.jit
def masked_block(j, low, full_low, full_high, BLOCK: tl.constexpr):
    """Where the j-th block begins that needs a mask: first those before the full part, then those behind it."""
    left = (full_low - low) // BLOCK
    return tl.where(j < left, low + j * BLOCK, full_high + (j - left) * BLOCK)


@triton.jit
def masked_blocks(low, high, full_low, full_high, BLOCK: tl.constexpr):
    """How many blocks need a mask."""
    return (full_low - low) // BLOCK + (tl.maximum(high - full_high, 0) + BLOCK - 1) // BLOCK

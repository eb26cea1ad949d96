"""The forward kernel: exact attention in one pass over the keys with a running maximum (Milakov and Gimelshein 2018;
Dao et al. 2022), and the log-sum-exp that the backward kernels need."""

from __future__ import annotations

import triton
import triton.language as tl

from .tile_math import (
    LOG2E,
    capped,
    dot,
    kept,
    keys_of_queries,
    masked_block,
    masked_blocks,
    narrowed,
    scaled_dot,
    span,
)


@triton.jit
def row_bounds_kernel(KEY_MASK, ROWS, stride_mask_b, stride_mask_s, keys, BLOCK: tl.constexpr):
    """ROWS[b] = (first key that is not padding, the one after the last, 1 if there are holes between), int32 [B, 3]."""
    batch = tl.program_id(0)
    mask = KEY_MASK + batch.to(tl.int64) * stride_mask_b
    first = tl.full([BLOCK], 2147483647, tl.int32)
    last = tl.zeros([BLOCK], tl.int32)
    count = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, keys, BLOCK):
        n = begin + tl.arange(0, BLOCK)
        real = tl.load(mask + n.to(tl.int64) * stride_mask_s, mask=n < keys, other=0) != 0
        first = tl.minimum(first, tl.where(real, n, 2147483647))
        last = tl.maximum(last, tl.where(real, n + 1, 0))
        count += real.to(tl.int32)
    first_key = tl.minimum(tl.min(first), keys)
    last_key = tl.max(last)
    tl.store(ROWS + batch * 3, first_key)
    tl.store(ROWS + batch * 3 + 1, last_key)
    tl.store(ROWS + batch * 3 + 2, (tl.sum(count) < last_key - first_key).to(tl.int32))


@triton.jit
def _attend(
    total,
    normaliser,
    maximum,
    q,
    begin,
    start,
    stop,
    m,
    head,
    K,
    V,
    KEY_MASK,
    stride_k_s,
    stride_v_s,
    stride_mask_s,
    keys,
    scale,
    softcap,
    dropout,
    seed,
    MASKED: tl.constexpr,
    PADDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One block of keys: the running (weighted values, sum of weights, maximum) after it."""
    n = begin + tl.arange(0, BLOCK_N)
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)
    real = n < keys
    if MASKED and PADDED:
        real = real & (tl.load(KEY_MASK + n.to(tl.int64) * stride_mask_s, mask=real, other=0) != 0)
    # 64 bits to the block, 32 within it: wide offsets of a whole block would take registers that there are not.
    here = tl.arange(0, BLOCK_N)
    keys_at = K + tl.cast(begin, tl.int64) * stride_k_s + (here[None, :] * stride_k_s + d[:, None])
    values_at = V + tl.cast(begin, tl.int64) * stride_v_s + (here[:, None] * stride_v_s + dv[None, :])
    if MASKED:
        k = tl.load(keys_at, mask=real[None, :] & (d[:, None] < HEAD_DIM), other=0.0)
        v = tl.load(values_at, mask=real[:, None] & (dv[None, :] < VALUE_DIM), other=0.0)
    else:
        k = tl.load(keys_at, mask=d[:, None] < HEAD_DIM, other=0.0) if D != HEAD_DIM else tl.load(keys_at)
        v = tl.load(values_at, mask=dv[None, :] < VALUE_DIM, other=0.0) if DV != VALUE_DIM else tl.load(values_at)
    if SOFTCAP:
        scores, _ = capped(scaled_dot(q, k, scale, UPCAST, BLOCK_M, BLOCK_N), softcap)
        scores = scores * LOG2E
    else:
        scores = scaled_dot(q, k, scale * LOG2E, UPCAST, BLOCK_M, BLOCK_N)
    if MASKED:
        seen = (n[None, :] >= start[:, None]) & (n[None, :] < stop[:, None])
        if PADDED:
            seen = seen & real[None, :]
        scores = tl.where(seen, scores, -float("inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    # A query that has seen no key yet has the maximum -inf, and -inf - (-inf) is not a number.
    anchor = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
    weights = tl.math.exp2(scores - anchor[:, None])
    shrink = tl.math.exp2(maximum - anchor)
    normaliser = normaliser * shrink + tl.sum(weights, 1)
    if DROPOUT:
        keep = kept(seed, head, m[:, None], n[None, :], dropout)
        weights = tl.where(keep, weights * (1.0 / (1.0 - dropout)), 0.0)
    total = dot(weights, v, total * shrink[:, None], UPCAST)
    return total, normaliser, new_maximum


@triton.jit
def forward_kernel(
    Q,
    K,
    V,
    OUT,
    LSE,
    BOUNDS,
    ROWS,
    KEY_MASK,
    SINKS,
    SEED,
    stride_q_b,
    stride_q_h,
    stride_q_s,
    stride_k_b,
    stride_k_h,
    stride_k_s,
    stride_v_b,
    stride_v_h,
    stride_v_s,
    stride_o_b,
    stride_o_s,
    stride_mask_b,
    stride_mask_s,
    heads,
    group,
    queries,
    keys,
    window,
    scale,
    softcap,
    dropout,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """OUT [B, Sq, H, Dv] and LSE [B, H, Sq] float32 (natural; -inf where there is no key), by blocks of queries."""
    tiles = tl.cdiv(queries, BLOCK_M)
    # Under a causal pattern the last queries have the most keys: they begin first, so that none is waited for.
    tile = tiles - 1 - tl.program_id(0) % tiles
    row = tl.program_id(0) // tiles
    batch = row // heads
    head = row % heads
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)
    inside = m < queries

    queries_at = Q + batch.to(tl.int64) * stride_q_b + head.to(tl.int64) * stride_q_h
    queries_at += m.to(tl.int64)[:, None] * stride_q_s + d[None, :]
    q = tl.load(queries_at, mask=inside[:, None] & (d[None, :] < HEAD_DIM), other=0.0)
    K += batch.to(tl.int64) * stride_k_b + (head // group).to(tl.int64) * stride_k_h
    V += batch.to(tl.int64) * stride_v_b + (head // group).to(tl.int64) * stride_v_h
    start, stop = keys_of_queries(
        m, batch, BOUNDS, ROWS, KEY_MASK, stride_mask_b, stride_mask_s, queries, keys, window,
        IS_CAUSAL, HAS_WINDOW, PACKED, PADDED,
    )  # fmt: skip
    is_free = inside == 0
    low, high, full_low, full_high = span(start, stop, is_free, keys, BLOCK_N)
    if PADDED:
        KEY_MASK += batch.to(tl.int64) * stride_mask_b
        if tl.load(ROWS + batch * 3 + 2) != 0:  # holes
            full_low = low + tl.cdiv(tl.maximum(high - low, 0), BLOCK_N) * BLOCK_N
            full_high = full_low
    seed = tl.load(SEED) if DROPOUT else 0

    total = tl.zeros([BLOCK_M, DV], tl.float32)
    normaliser = tl.zeros([BLOCK_M], tl.float32)
    maximum = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    for j in range(0, masked_blocks(low, high, full_low, full_high, BLOCK_N)):
        begin = masked_block(j, low, full_low, full_high, BLOCK_N)
        total, normaliser, maximum = _attend(
            total, normaliser, maximum, q, begin, start, stop, m, row, K, V, KEY_MASK, stride_k_s, stride_v_s,
            stride_mask_s, keys, scale, softcap, dropout, seed,
            True, PADDED, SOFTCAP, DROPOUT, HEAD_DIM, VALUE_DIM, D, DV, BLOCK_M, BLOCK_N, UPCAST,
        )  # fmt: skip
    for begin in range(full_low, full_high, BLOCK_N):
        total, normaliser, maximum = _attend(
            total, normaliser, maximum, q, begin, start, stop, m, row, K, V, KEY_MASK, stride_k_s, stride_v_s,
            stride_mask_s, keys, scale, softcap, dropout, seed,
            False, PADDED, SOFTCAP, DROPOUT, HEAD_DIM, VALUE_DIM, D, DV, BLOCK_M, BLOCK_N, UPCAST,
        )  # fmt: skip

    # The largest weight of a query that has a key is 1.
    sighted = normaliser > 0
    if HAS_SINKS:
        sink = tl.load(SINKS + row).to(tl.float32) * LOG2E
        anchor = tl.maximum(maximum, sink)
        shrink = tl.math.exp2(maximum - anchor)
        normaliser = normaliser * shrink + tl.math.exp2(sink - anchor)
        total = total * shrink[:, None]
        maximum = anchor
    normaliser = tl.where(sighted, normaliser, 1.0)
    lse = tl.where(sighted, (maximum + tl.math.log2(normaliser)) / LOG2E, -float("inf"))
    # Counted anew from the block's beginning, or the masks of the loads above would be kept until here.
    here = tl.arange(0, BLOCK_M)
    inside = here < queries - tile * BLOCK_M
    begin = (tile * BLOCK_M).to(tl.int64)
    tl.store(LSE + row.to(tl.int64) * queries + begin + here, lse, mask=inside)
    OUT += batch.to(tl.int64) * stride_o_b + begin * stride_o_s + head * VALUE_DIM
    output = narrowed(total / normaliser[:, None], OUT.dtype.element_ty, UPCAST)
    output_at = OUT + (here[:, None] * stride_o_s + dv[None, :])
    tl.store(output_at, output, mask=inside[:, None] & (dv[None, :] < VALUE_DIM))

"""The backward kernels: deterministic, without atomics. One walks the keys of a block of queries and owns their
gradient, one walks the queries of a block of keys and owns those; each computes the weights again from the log-sum-exp.
"""

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
    queries_of_keys,
    scaled_dot,
    span,
)


@triton.jit
def delta_kernel(
    OUT,
    DO,
    LSE,
    DLSE,
    DELTA,
    SINKS,
    DSINKS,
    stride_o_b,
    stride_o_s,
    stride_do_b,
    stride_do_h,
    stride_do_s,
    heads,
    queries,
    HAS_SINKS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """DELTA [B, H, Sq] = <o, do> - dlse, what every score of a query is pulled down by; and DSINKS [B, H, blocks].

    A sink's score s has the weight exp(s - lse) and no value, hence the gradient -exp(s - lse) delta.
    """
    tiles = tl.cdiv(queries, BLOCK_M)
    tile = tl.program_id(0) % tiles
    row = tl.program_id(0) // tiles
    batch = row // heads
    head = row % heads
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dv = tl.arange(0, DV)
    inside = m < queries
    both = inside[:, None] & (dv[None, :] < VALUE_DIM)
    wide = m.to(tl.int64)[:, None]
    at = row.to(tl.int64) * queries + m
    OUT += batch.to(tl.int64) * stride_o_b + head * VALUE_DIM
    DO += batch.to(tl.int64) * stride_do_b + head.to(tl.int64) * stride_do_h
    o = tl.load(OUT + wide * stride_o_s + dv[None, :], mask=both, other=0.0).to(tl.float32)
    do = tl.load(DO + wide * stride_do_s + dv[None, :], mask=both, other=0.0).to(tl.float32)
    delta = tl.sum(o * do, 1) - tl.load(DLSE + at, mask=inside, other=0.0)
    lse = tl.load(LSE + at, mask=inside, other=-float("inf"))
    delta = tl.where(lse == -float("inf"), 0.0, delta)
    tl.store(DELTA + at, delta, mask=inside)
    if HAS_SINKS:
        weight = tl.math.exp2((tl.load(SINKS + row).to(tl.float32) - lse) * LOG2E)
        tl.store(DSINKS + tl.program_id(0), -tl.sum(tl.where(lse == -float("inf"), 0.0, weight * delta)))


@triton.jit
def _weights(q, k, v, do, lse, delta, seen, m, n, head, scale, softcap, dropout, seed,
             MASKED: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
             M: tl.constexpr, N: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """(weights after dropout, gradient of the scores before the factor `scale`), for scores laid out [M, N].

    `q` and `k` are [M, D] and [D, N] where M are the queries; laid out the other way round, they change places, and so
    do `do` and `v`. `m`, `n`, `lse` and `delta` come broadcast to the layout.
    """
    if SOFTCAP:
        scores, tanh = capped(scaled_dot(q, k, scale, UPCAST, M, N), softcap)
        scores = scores * LOG2E
    else:
        scores = scaled_dot(q, k, scale * LOG2E, UPCAST, M, N)
    # A query without a key has the log-sum-exp -inf and no weights.
    weights = tl.math.exp2(scores - tl.where(lse == -float("inf"), float("inf"), lse * LOG2E))
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    grad = scaled_dot(do, v, 1.0, UPCAST, M, N)
    used = weights
    if DROPOUT:
        keep = kept(seed, head, m, n, dropout)
        used = tl.where(keep, weights * (1.0 / (1.0 - dropout)), 0.0)
        grad = tl.where(keep, grad * (1.0 / (1.0 - dropout)), 0.0)
    grad = weights * (grad - delta)
    if SOFTCAP:
        grad = grad * (1.0 - tanh * tanh)
    if MASKED:
        # Where padding is not finite, 0 times it is not 0.
        grad = tl.where(seen, grad, 0.0)
    return used, grad


@triton.jit
def _add_to_query_grad(dq, q, do, lse, delta, begin, start, stop, m, row, K, V, KEY_MASK,
                       stride_k_s, stride_v_s, stride_mask_s, keys, scale, softcap, dropout, seed,
                       MASKED: tl.constexpr, PADDED: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
                       HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                       BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    n = begin + tl.arange(0, BLOCK_N)
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)
    real = n < keys
    if MASKED and PADDED:
        real = real & (tl.load(KEY_MASK + n.to(tl.int64) * stride_mask_s, mask=real, other=0) != 0)
    # 64 bits to the block, 32 within it: wide offsets of a whole block would take registers that there are not.
    here = tl.arange(0, BLOCK_N)[:, None]
    k_at = K + tl.cast(begin, tl.int64) * stride_k_s + (here * stride_k_s + d[None, :])
    v_at = V + tl.cast(begin, tl.int64) * stride_v_s + (here * stride_v_s + dv[None, :])
    if MASKED:
        k = tl.load(k_at, mask=real[:, None] & (d[None, :] < HEAD_DIM), other=0.0)
        v = tl.load(v_at, mask=real[:, None] & (dv[None, :] < VALUE_DIM), other=0.0)
    else:
        k = tl.load(k_at, mask=d[None, :] < HEAD_DIM, other=0.0) if D != HEAD_DIM else tl.load(k_at)
        v = tl.load(v_at, mask=dv[None, :] < VALUE_DIM, other=0.0) if DV != VALUE_DIM else tl.load(v_at)
    seen = (n[None, :] >= start[:, None]) & (n[None, :] < stop[:, None])
    if MASKED and PADDED:
        seen = seen & real[None, :]
    _, grad = _weights(
        q, tl.trans(k), tl.trans(v), do, lse[:, None], delta[:, None], seen, m[:, None], n[None, :], row, scale,
        softcap, dropout, seed, MASKED, SOFTCAP, DROPOUT, BLOCK_M, BLOCK_N, UPCAST,
    )  # fmt: skip
    return dot(grad, k, dq, UPCAST)


@triton.jit
def query_grad_kernel(
    Q,
    K,
    V,
    DO,
    LSE,
    DELTA,
    DQ,
    BOUNDS,
    ROWS,
    KEY_MASK,
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
    stride_do_b,
    stride_do_h,
    stride_do_s,
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
    DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """DQ [B, H, Sq, D] (contiguous), one block of queries each."""
    tiles = tl.cdiv(queries, BLOCK_M)
    tile = tiles - 1 - tl.program_id(0) % tiles
    row = tl.program_id(0) // tiles
    batch = row // heads
    head = row % heads
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)
    inside = m < queries
    wide = m.to(tl.int64)[:, None]
    in_q = inside[:, None] & (d[None, :] < HEAD_DIM)
    in_do = inside[:, None] & (dv[None, :] < VALUE_DIM)

    Q += batch.to(tl.int64) * stride_q_b + head.to(tl.int64) * stride_q_h
    DO += batch.to(tl.int64) * stride_do_b + head.to(tl.int64) * stride_do_h
    q = tl.load(Q + wide * stride_q_s + d[None, :], mask=in_q, other=0.0)
    do = tl.load(DO + wide * stride_do_s + dv[None, :], mask=in_do, other=0.0)
    at = row.to(tl.int64) * queries + m
    lse = tl.load(LSE + at, mask=inside, other=-float("inf"))
    delta = tl.load(DELTA + at, mask=inside, other=0.0)
    K += batch.to(tl.int64) * stride_k_b + (head // group).to(tl.int64) * stride_k_h
    V += batch.to(tl.int64) * stride_v_b + (head // group).to(tl.int64) * stride_v_h
    start, stop = keys_of_queries(
        m, batch, BOUNDS, ROWS, KEY_MASK, stride_mask_b, stride_mask_s, queries, keys, window,
        IS_CAUSAL, HAS_WINDOW, PACKED, PADDED,
    )  # fmt: skip
    low, high, full_low, full_high = span(start, stop, inside == 0, keys, BLOCK_N)
    if PADDED:
        KEY_MASK += batch.to(tl.int64) * stride_mask_b
        if tl.load(ROWS + batch * 3 + 2) != 0:  # holes
            full_low = low + tl.cdiv(tl.maximum(high - low, 0), BLOCK_N) * BLOCK_N
            full_high = full_low
    seed = tl.load(SEED) if DROPOUT else 0

    dq = tl.zeros([BLOCK_M, D], tl.float32)
    for j in range(0, masked_blocks(low, high, full_low, full_high, BLOCK_N)):
        begin = masked_block(j, low, full_low, full_high, BLOCK_N)
        dq = _add_to_query_grad(
            dq, q, do, lse, delta, begin, start, stop, m, row, K, V, KEY_MASK, stride_k_s, stride_v_s, stride_mask_s,
            keys, scale, softcap, dropout, seed,
            True, PADDED, SOFTCAP, DROPOUT, HEAD_DIM, VALUE_DIM, D, DV, BLOCK_M, BLOCK_N, UPCAST,
        )  # fmt: skip
    for begin in range(full_low, full_high, BLOCK_N):
        dq = _add_to_query_grad(
            dq, q, do, lse, delta, begin, start, stop, m, row, K, V, KEY_MASK, stride_k_s, stride_v_s, stride_mask_s,
            keys, scale, softcap, dropout, seed,
            False, PADDED, SOFTCAP, DROPOUT, HEAD_DIM, VALUE_DIM, D, DV, BLOCK_M, BLOCK_N, UPCAST,
        )  # fmt: skip
    DQ += (row.to(tl.int64) * queries + tile * BLOCK_M) * HEAD_DIM
    # Counted anew from the block's beginning, or the masks of the loads above would be kept until here.
    here = tl.arange(0, BLOCK_M)[:, None]
    in_q = (here < queries - tile * BLOCK_M) & (d[None, :] < HEAD_DIM)
    tl.store(DQ + (here * HEAD_DIM + d[None, :]), narrowed(dq * scale, DQ.dtype.element_ty, UPCAST), mask=in_q)


@triton.jit
def _add_to_key_grads(dk, dv_sum, k, v, begin, start, stop, n, batch, head, heads, Q, DO, LSE, DELTA,
                      stride_q_h, stride_q_s, stride_do_h, stride_do_s, queries, scale, softcap, dropout, seed,
                      MASKED: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
                      HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    m = begin + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)
    inside = m < queries
    row = batch * heads + head
    Q += tl.cast(head, tl.int64) * stride_q_h + tl.cast(begin, tl.int64) * stride_q_s
    DO += tl.cast(head, tl.int64) * stride_do_h + tl.cast(begin, tl.int64) * stride_do_s
    LSE += tl.cast(row, tl.int64) * queries
    DELTA += tl.cast(row, tl.int64) * queries
    here = tl.arange(0, BLOCK_M)[:, None]
    q_at = Q + (here * stride_q_s + d[None, :])
    do_at = DO + (here * stride_do_s + dv[None, :])
    # Every mask costs registers in a loop that has none to spare.
    if MASKED:
        lse = tl.load(LSE + m, mask=inside, other=-float("inf"))
        delta = tl.load(DELTA + m, mask=inside, other=0.0)
        # A query that sees nothing may be padding, which need not be finite.
        sighted = lse > -float("inf")
        q = tl.load(q_at, mask=sighted[:, None] & (d[None, :] < HEAD_DIM), other=0.0)
        do = tl.load(do_at, mask=sighted[:, None] & (dv[None, :] < VALUE_DIM), other=0.0)
    else:
        q = tl.load(q_at, mask=d[None, :] < HEAD_DIM, other=0.0) if D != HEAD_DIM else tl.load(q_at)
        do = tl.load(do_at, mask=dv[None, :] < VALUE_DIM, other=0.0) if DV != VALUE_DIM else tl.load(do_at)
        lse = tl.load(LSE + m)
        delta = tl.load(DELTA + m)
    # Laid out [keys, queries], so that the two products below need no transposition of the weights.
    seen = (m[None, :] >= start[:, None]) & (m[None, :] < stop[:, None])
    used, grad = _weights(
        k, tl.trans(q), tl.trans(do), v, lse[None, :], delta[None, :], seen, m[None, :], n[:, None], row, scale,
        softcap, dropout, seed, MASKED, SOFTCAP, DROPOUT, BLOCK_N, BLOCK_M, UPCAST,
    )  # fmt: skip
    return dot(grad, q, dk, UPCAST), dot(used, do, dv_sum, UPCAST)


@triton.jit
def key_grad_kernel(
    Q,
    K,
    V,
    DO,
    LSE,
    DELTA,
    DK,
    DV_GRAD,
    BOUNDS,
    ROWS,
    KEY_MASK,
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
    stride_do_b,
    stride_do_h,
    stride_do_s,
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
    DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """DK [B, Hkv, Sk, D] and DV_GRAD [B, Hkv, Sk, Dv] (contiguous), one block of keys each.

    A program goes through all query heads of its key head, so that grouped heads need neither atomics nor a sum later.
    """
    tiles = tl.cdiv(keys, BLOCK_N)
    tile = tl.program_id(0) % tiles
    key_row = tl.program_id(0) // tiles
    key_heads = heads // group
    batch = key_row // key_heads
    key_head = key_row % key_heads
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)
    inside = n < keys
    wide = n.to(tl.int64)[:, None]
    in_k = inside[:, None] & (d[None, :] < HEAD_DIM)
    in_v = inside[:, None] & (dv[None, :] < VALUE_DIM)

    K += batch.to(tl.int64) * stride_k_b + key_head.to(tl.int64) * stride_k_h
    V += batch.to(tl.int64) * stride_v_b + key_head.to(tl.int64) * stride_v_h
    k = tl.load(K + wide * stride_k_s + d[None, :], mask=in_k, other=0.0)
    v = tl.load(V + wide * stride_v_s + dv[None, :], mask=in_v, other=0.0)
    Q += batch.to(tl.int64) * stride_q_b
    DO += batch.to(tl.int64) * stride_do_b
    start, stop = queries_of_keys(
        n, batch, BOUNDS, ROWS, KEY_MASK, stride_mask_b, stride_mask_s, queries, keys, window,
        IS_CAUSAL, HAS_WINDOW, PACKED, PADDED,
    )  # fmt: skip
    low, high, full_low, full_high = span(start, stop, inside == 0, queries, BLOCK_M)
    if PADDED and IS_CAUSAL:  # noqa: SIM102 - known when compiling, unlike what follows
        if tl.load(ROWS + batch * 3 + 2) != 0:  # holes
            full_low = low + tl.cdiv(tl.maximum(high - low, 0), BLOCK_M) * BLOCK_M
            full_high = full_low
    seed = tl.load(SEED) if DROPOUT else 0

    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv_sum = tl.zeros([BLOCK_N, DV], tl.float32)
    # One loop over heads and blocks: a nest of loops keeps the addresses of all of them in registers.
    blocks = masked_blocks(low, high, full_low, full_high, BLOCK_M)
    for i in range(0, group * blocks):
        head = key_head * group + i // blocks
        begin = masked_block(i % blocks, low, full_low, full_high, BLOCK_M)
        dk, dv_sum = _add_to_key_grads(
            dk, dv_sum, k, v, begin, start, stop, n, batch, head, heads, Q, DO, LSE, DELTA, stride_q_h, stride_q_s,
            stride_do_h, stride_do_s, queries, scale, softcap, dropout, seed,
            True, SOFTCAP, DROPOUT, HEAD_DIM, VALUE_DIM, D, DV, BLOCK_M, BLOCK_N, UPCAST,
        )  # fmt: skip
    blocks = (full_high - full_low) // BLOCK_M
    for i in range(0, group * blocks):
        head = key_head * group + i // blocks
        begin = full_low + i % blocks * BLOCK_M
        dk, dv_sum = _add_to_key_grads(
            dk, dv_sum, k, v, begin, start, stop, n, batch, head, heads, Q, DO, LSE, DELTA, stride_q_h, stride_q_s,
            stride_do_h, stride_do_s, queries, scale, softcap, dropout, seed,
            False, SOFTCAP, DROPOUT, HEAD_DIM, VALUE_DIM, D, DV, BLOCK_M, BLOCK_N, UPCAST,
        )  # fmt: skip
    DK += (key_row.to(tl.int64) * keys + tile * BLOCK_N) * HEAD_DIM
    DV_GRAD += (key_row.to(tl.int64) * keys + tile * BLOCK_N) * VALUE_DIM
    here = tl.arange(0, BLOCK_N)[:, None]
    inside = here < keys - tile * BLOCK_N
    in_k = inside & (d[None, :] < HEAD_DIM)
    in_v = inside & (dv[None, :] < VALUE_DIM)
    tl.store(DK + (here * HEAD_DIM + d[None, :]), narrowed(dk * scale, DK.dtype.element_ty, UPCAST), mask=in_k)
    tl.store(DV_GRAD + (here * VALUE_DIM + dv[None, :]), narrowed(dv_sum, DV_GRAD.dtype.element_ty, UPCAST), mask=in_v)

"""Attention in plain PyTorch: its own scaled dot-product attention where exact, written-out mathematics elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .pattern import Pattern, segment_bounds


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    segments_q: Tensor | None,
    segments_k: Tensor | None,
    sinks: Tensor | None,
    pattern: Pattern,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """What `dp_flash_attn.attention` promises, on any device; the arguments have been checked there.

    Softcapping, sinks and the log-sum-exp (empty unless asked for) are computed in float32 or better whatever the dtype
    of `query`.
    """
    allowed = _allowed(query.shape[2], key.shape[2], query.device, key_mask, segments_q, segments_k, mask, pattern)
    has_key = None
    if allowed is not None:
        # A query without keys attends everything and is zeroed at the end: softmax over nothing is NaN, and so is
        # its gradient, whatever zero multiplies it.
        has_key = allowed.any(dim=-1, keepdim=True)
        allowed = allowed | ~has_key
    normaliser = query.new_empty(0)
    if pattern.softcap is not None or sinks is not None or lse:
        output, normaliser = _written_out(query, key, value, allowed, bias, sinks, pattern)
    else:
        grouped = key.shape[1] != query.shape[1]
        if grouped and allowed is not None:
            # With a mask SDPA's fused CUDA kernels take no grouped heads.
            key, value, grouped = _repeat_heads(key, query), _repeat_heads(value, query), False
        attn_mask = allowed
        if bias is not None:
            attn_mask = bias.to(query.dtype)
            if allowed is not None:
                attn_mask = attn_mask.masked_fill(~allowed, -torch.inf)
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask, pattern.dropout, scale=pattern.scale, enable_gqa=grouped
        )
    if has_key is not None:
        output = output.masked_fill(~has_key, 0.0)
        if lse:
            normaliser = normaliser.masked_fill(~has_key.squeeze(-1), -torch.inf)
    return output.transpose(1, 2), normaliser


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    sinks: Tensor | None,
    pattern: Pattern,
    *,
    lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """`attention` of the sequences packed into one row, each by itself: what they cost together is the sum of what each
    costs alone, where a mask over the whole row would cost the square of its length.

    The boundaries are read, which on a CPU is no waiting.
    """
    sizes_q, sizes_k = _sizes(cu_seq_lens_q, query.shape[2]), _sizes(cu_seq_lens_k, key.shape[2])
    sequences = zip(query.split(sizes_q, 2), key.split(sizes_k, 2), value.split(sizes_k, 2), strict=True)
    plain = pattern.softcap is None and sinks is None and not lse
    outputs, normalisers = [], []
    for q, k, v in sequences:
        length, window = q.shape[2], pattern.window
        square = length == k.shape[2] > 0
        if plain and square and (window is None or window >= length):
            grouped = k.shape[1] != q.shape[1]
            output = F.scaled_dot_product_attention(
                q, k, v, None, pattern.dropout, is_causal=pattern.is_causal, scale=pattern.scale, enable_gqa=grouped
            ).transpose(1, 2)
        elif length:
            output, normaliser = attention(q, k, v, None, None, None, sinks, pattern, lse=lse)
            normalisers.append(normaliser)
        else:
            continue
        outputs.append(output)
    return torch.cat(outputs, 1), torch.cat(normalisers, 2) if lse else query.new_empty(0)


def _sizes(cu_seq_lens: Tensor, total: int) -> list[int]:
    """Lengths of the packed sequences; what follows the last one is one more."""
    ends = [0, *cu_seq_lens[1:].tolist(), total]
    return [stop - start for start, stop in zip(ends, ends[1:], strict=False)]


def _allowed(
    queries: int,
    keys: int,
    device: torch.device,
    key_mask: Tensor | None,
    segments_q: Tensor | None,
    segments_k: Tensor | None,
    mask: Tensor | None,
    pattern: Pattern,
) -> Tensor | None:
    """Bool, broadcastable to [B, H, Sq, Sk], True where the query may attend; None where it may attend every key."""
    if keys == 0:
        return torch.zeros(queries, 0, dtype=torch.bool, device=device)
    patterns = [] if mask is None else [mask]
    # The only query is the last one, and nothing comes after the last key.
    is_causal = pattern.is_causal and (queries > 1 or segments_q is not None)
    n = torch.arange(keys, device=device)
    own = torch.arange(queries, device=device)[None] + (keys - queries)
    if segments_q is not None and segments_k is not None:
        start, stop, distance = segment_bounds(segments_q, segments_k).unbind(1)
        own = torch.arange(queries, device=device) + distance
        patterns.append(((n >= start[..., None]) & (n < stop[..., None]))[:, None])
    if key_mask is not None:
        patterns.append(key_mask[:, None, None, :])
        if pattern.is_causal:
            real = key_mask.gather(1, own.clamp_min(0).expand(len(key_mask), queries)) & (own >= 0)
            patterns.append(real[:, None, :, None])
    if is_causal:
        patterns.append((n <= own[..., None])[:, None])
    if pattern.window is not None:
        patterns.append(((n - own[..., None]).abs() < pattern.window)[:, None])
    allowed = None
    for part in patterns:
        allowed = part if allowed is None else allowed & part
    return allowed


def _repeat_heads(tensor: Tensor, query: Tensor) -> Tensor:
    """[B, Hkv, S, D] -> [B, H, S, D]."""
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    pattern: Pattern,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Autocast would put the products back into half precision.
    with torch.autocast(device_type=query.device.type, enabled=False):
        key, value = _repeat_heads(key, query).to(dtype), _repeat_heads(value, query).to(dtype)
        scores = query.to(dtype) @ key.transpose(-1, -2) * pattern.scale
        if pattern.softcap is not None:
            scores = pattern.softcap * torch.tanh(scores / pattern.softcap)
        if bias is not None:
            scores = scores + bias.to(dtype)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        if sinks is not None:
            column = sinks.to(dtype).expand(query.shape[:2])[:, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, column], dim=-1)
        weights = scores.softmax(dim=-1)[..., : key.shape[2]]
        output = (F.dropout(weights, pattern.dropout) @ value).to(query.dtype)
        return output, scores.logsumexp(dim=-1)

"""Launches the Triton kernels: attention forward and backward on tensors, without anything of autograd's."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import backward as backward_kernels
from . import forward as forward_kernels
from .pattern import Pattern, segment_bounds
from .tile_math import INTERPRETED
from .tiles import Tile, tile

MIN_WIDTH, MAX_WIDTH = 16, 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def architecture(device: torch.device) -> str:
    """The key of the tile table for a device; an unknown one gets the tiles that need the least."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major in (9, 10):
        return f"sm_{major}0"
    return "sm_80" if (major, minor) == (8, 0) else "sm_120"


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    segments_q: Tensor | None,
    segments_k: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    pattern: Pattern,
) -> tuple[Tensor, Tensor]:
    """Exact attention.

    Args:
        query: [B, H, Sq, D], `DTYPES`, D at most 256; any strides.
        key: [B, Hkv, Sk, D], of the same dtype, as is `value`.
        value: [B, Hkv, Sk, Dv].
        key_mask: bool [B, Sk], False where a key is padding. Under `is_causal` a query whose own key is padding
            sees nothing.
        segments_q: int [B, Sq], the number of the packed sequence of each query, never decreasing; with the next one.
        segments_k: int [B, Sk].
        sinks: float32 [B, H].
        seed: int64 [1], needed with dropout.
        pattern: the rest.

    Returns:
        ([B, Sq, H, Dv], log-sum-exp [B, H, Sq] float32, -inf where a query sees nothing), both contiguous.
    """
    asked_width = value.shape[3]
    query, key, value = (_readable(tensor) for tensor in (query, key, value))
    batch, heads, queries, width = query.shape
    key_heads, keys, value_width = key.shape[1], key.shape[2], value.shape[3]
    output = query.new_empty(batch, queries, heads, value_width)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    if output.numel() == 0 or keys == 0:
        return _narrowed(output.zero_(), asked_width), lse.fill_(-torch.inf)
    tiles = _tile("forward", query, value, pattern)
    bounds, _ = _segment_bounds(segments_q, segments_k)
    rows = _row_bounds(key_mask)
    forward_kernels.forward_kernel[(triton.cdiv(queries, tiles.block_m) * batch * heads,)](
        query, key, value, output, lse, bounds, rows, _bytes(key_mask), sinks, seed,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:2], *_mask_strides(key_mask),
        heads, heads // key_heads, queries, keys, pattern.window or 0,
        pattern.scale, pattern.softcap or 0.0, pattern.dropout,
        HAS_SINKS=sinks is not None,
        **_constants(pattern, bounds, rows, width, value_width, query.dtype),
        **_launch(tiles),
    )  # fmt: skip
    return _narrowed(output, asked_width), lse


def backward(
    output_grad: Tensor,
    lse_grad: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    segments_q: Tensor | None,
    segments_k: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    pattern: Pattern,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `forward`, to the bit the same every time.

    Args:
        output_grad: [B, Sq, H, Dv].
        lse_grad: [B, H, Sq] or None.
        output, lse: what `forward` returned; the others are what it was given.

    Returns:
        Gradients of query, key and value, contiguous, in their dtypes, and of sinks, float32 [B, H], or None.
    """
    asked_widths = query.shape[3], key.shape[3], value.shape[3]
    query, key, value = (_readable(tensor) for tensor in (query, key, value))
    output = _readable(output, sequence=1)
    batch, heads, queries, width = query.shape
    key_heads, keys, value_width = key.shape[1], key.shape[2], value.shape[3]
    output_grad = _readable(output_grad, sequence=1).transpose(1, 2)
    query_grad, key_grad, value_grad = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)
    )
    sinks_grad = None
    if sinks is not None:
        sinks_grad = torch.zeros_like(sinks)
    if output.numel() == 0 or keys == 0:
        return *(grad.zero_() for grad in (query_grad, key_grad, value_grad)), sinks_grad
    bounds_q, bounds_k = _segment_bounds(segments_q, segments_k)
    rows = _row_bounds(key_mask)
    constants = _constants(pattern, bounds_q, rows, width, value_width, query.dtype)
    delta = torch.empty_like(lse)
    blocks = triton.cdiv(queries, _DELTA_BLOCK)
    partial = None if sinks is None else torch.empty(batch, heads, blocks, dtype=torch.float32, device=query.device)
    backward_kernels.delta_kernel[(blocks * batch * heads,)](
        output, output_grad, lse, torch.zeros_like(lse) if lse_grad is None else lse_grad.contiguous(), delta,
        sinks, partial, *output.stride()[:2], *output_grad.stride()[:3], heads, queries,
        HAS_SINKS=sinks is not None, VALUE_DIM=value_width, DV=_padded(value_width), BLOCK_M=_DELTA_BLOCK,
    )  # fmt: skip
    if partial is not None:
        sinks_grad = partial.sum(-1)
    strides = (
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output_grad.stride()[:3],
        *_mask_strides(key_mask),
    )  # fmt: skip
    numbers = (
        heads, heads // key_heads, queries, keys, pattern.window or 0,
        pattern.scale, pattern.softcap or 0.0, pattern.dropout,
    )  # fmt: skip
    tiles = _tile("query_grad", query, value, pattern)
    backward_kernels.query_grad_kernel[(triton.cdiv(queries, tiles.block_m) * batch * heads,)](
        query, key, value, output_grad, lse, delta, query_grad, bounds_q, rows, _bytes(key_mask), seed,
        *strides, *numbers, **constants, **_launch(tiles),
    )  # fmt: skip
    tiles = _tile("key_grad", query, value, pattern)
    backward_kernels.key_grad_kernel[(triton.cdiv(keys, tiles.block_n) * batch * key_heads,)](
        query, key, value, output_grad, lse, delta, key_grad, value_grad, bounds_k, rows, _bytes(key_mask), seed,
        *strides, *numbers, **constants, **_launch(tiles),
    )  # fmt: skip
    grads = zip((query_grad, key_grad, value_grad), asked_widths, strict=True)
    return *(_narrowed(grad, asked) for grad, asked in grads), sinks_grad


_DELTA_BLOCK = 64


def _padded(width: int) -> int:
    """The power of two in which a head dimension is computed."""
    return max(MIN_WIDTH, triton.next_power_of_2(width))


def _readable(tensor: Tensor, sequence: int = 2) -> Tensor:
    """As the kernels read it, copied where it is not: rows contiguous and, with zeros behind them, of a multiple of 16
    numbers, and offsets within a tile that fit into 32 bits. All else is read by its stride."""
    excess = -tensor.shape[-1] % MIN_WIDTH
    if excess:
        return torch.nn.functional.pad(tensor, (0, excess))
    return tensor if tensor.stride(-1) == 1 and tensor.stride(sequence) < 2**23 else tensor.contiguous()


def _narrowed(tensor: Tensor, width: int) -> Tensor:
    """Without the zeros that `_readable` has put behind."""
    return tensor if tensor.shape[-1] == width else tensor[..., :width].contiguous()


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def _mask_strides(mask: Tensor | None) -> tuple[int, int]:
    return (0, 0) if mask is None else (mask.stride(0), mask.stride(1))


def _constants(
    pattern: Pattern, bounds: Tensor | None, rows: Tensor | None, width: int, value_width: int, dtype: torch.dtype
) -> dict[str, int | bool]:
    return {
        "IS_CAUSAL": pattern.is_causal,
        "HAS_WINDOW": pattern.window is not None,
        "PACKED": bounds is not None,
        "PADDED": rows is not None,
        "SOFTCAP": pattern.softcap is not None,
        "DROPOUT": pattern.dropout > 0,
        "HEAD_DIM": width,
        "VALUE_DIM": value_width,
        "D": _padded(width),
        "DV": _padded(value_width),
        "UPCAST": INTERPRETED and dtype == torch.bfloat16,
    }


def _tile(kernel: str, query: Tensor, value: Tensor, pattern: Pattern) -> Tile:
    width = _padded(max(query.shape[3], value.shape[3]))
    return tile(architecture(query.device), kernel, query.element_size() == 2, width, pattern.dropout > 0)


def _launch(tiles: Tile) -> dict[str, int]:
    block_m, block_n, warps, stages = tiles
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def _row_bounds(key_mask: Tensor | None) -> Tensor | None:
    """int32 [B, 3]: first real key, the one after the last, whether there are holes; found on the device."""
    if key_mask is None:
        return None
    batch, keys = key_mask.shape
    rows = torch.empty(batch, 3, dtype=torch.int32, device=key_mask.device)
    forward_kernels.row_bounds_kernel[(batch,)](
        _bytes(key_mask), rows, *_mask_strides(key_mask), keys, BLOCK=min(1024, triton.next_power_of_2(keys))
    )
    return rows


def _segment_bounds(segments_q: Tensor | None, segments_k: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if segments_q is None or segments_k is None:
        return None, None
    return segment_bounds(segments_q, segments_k), segment_bounds(segments_k, segments_q)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):  # type: ignore[no-untyped-def]
        output, lse = forward(*arguments)
        ctx.save_for_backward(*arguments[:8], output, lse)
        ctx.pattern = arguments[8]
        return output, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, output_grad, lse_grad):  # type: ignore[no-untyped-def]
        query, key, value, key_mask, segments_q, segments_k, sinks, seed, output, lse = ctx.saved_tensors
        query_grad, key_grad, value_grad, sinks_grad = backward(
            output_grad, lse_grad, query, key, value, output, lse,
            key_mask, segments_q, segments_k, sinks, seed, ctx.pattern,
        )  # fmt: skip
        return query_grad, key_grad, value_grad, None, None, None, sinks_grad, None, None


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    segments_q: Tensor | None,
    segments_k: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    pattern: Pattern,
) -> tuple[Tensor, Tensor]:
    """`forward` with gradients for query, key, value and sinks, through the log-sum-exp too."""
    return _FlashAttention.apply(query, key, value, key_mask, segments_q, segments_k, sinks, seed, pattern)

"""The Triton attention as an operator of PyTorch's, so that `torch.compile` takes it whole.

The kernel package registers nothing itself: the Hub may load it twice, and a name can be registered only once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpfa_hf._kernel import Pattern


@torch.library.custom_op("dpfa_hf::attention_forward", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    segments_q: Tensor | None,
    segments_k: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    scale: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    from dpfa_hf._kernel import flash

    pattern = Pattern(scale, is_causal, window, softcap, dropout)
    return flash.forward(query, key, value, key_mask, segments_q, segments_k, sinks, seed, pattern)


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = query.shape
    output = query.new_empty(batch, queries, heads, value.shape[3])
    return output, query.new_empty(batch, heads, queries, dtype=torch.float32)


@torch.library.custom_op("dpfa_hf::attention_backward", mutates_args=())
def _backward(
    output_grad: Tensor,
    lse_grad: Tensor,
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
    scale: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from dpfa_hf._kernel import flash

    pattern = Pattern(scale, is_causal, window, softcap, dropout)
    inputs = (query, key, value, output, lse, key_mask, segments_q, segments_k, sinks, seed, pattern)
    *grads, sinks_grad = flash.backward(output_grad, lse_grad, *inputs)
    return *grads, lse.new_empty(0) if sinks_grad is None else sinks_grad


@_backward.register_fake
def _(
    output_grad: Tensor,
    lse_grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    segments_q: Tensor | None,
    segments_k: Tensor | None,
    sinks: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query_grad, key_grad, value_grad = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)
    )
    return query_grad, key_grad, value_grad, lse.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:8], *output)
    ctx.numbers = inputs[8:]


def _differentiate(ctx: Any, output_grad: Tensor, lse_grad: Tensor) -> tuple:
    query, key, value, key_mask, segments_q, segments_k, sinks, seed, output, lse = ctx.saved_tensors
    *grads, sinks_grad = _backward(
        output_grad,
        lse_grad,
        query,
        key,
        value,
        output,
        lse,
        key_mask,
        segments_q,
        segments_k,
        sinks,
        seed,
        *ctx.numbers,
    )
    return *grads, None, None, None, sinks_grad if sinks is not None else None, *[None] * 6


_forward.register_autograd(_differentiate, setup_context=_save)


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
    """The kernel package's `flash_attention` as operators `dpfa_hf::attention_forward` and `attention_backward`."""
    return _forward(query, key, value, key_mask, segments_q, segments_k, sinks, seed, *pattern)
